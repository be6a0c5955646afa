"""Settings of every test: the CPU unless told otherwise, and an error where shapes broadcast by adding axes."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
