"""A norm and the product of its rows with a matrix, for few rows: the sizes, and the kernel of each back end."""
