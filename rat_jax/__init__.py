"""Language models between recurrence and attention: RAT, its hybrids and its baselines, in JAX."""

__version__ = "0.1.0"
