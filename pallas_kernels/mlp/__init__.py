"""Matrix products of the MLP with its GELU in their epilogues."""
