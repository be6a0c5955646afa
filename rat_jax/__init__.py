"""Language models between recurrence and attention: RAT, its hybrids and its baselines, in JAX."""
