"""All that stands between two mixers, for a token of few rows: the sizes, and the kernel of each back end."""
