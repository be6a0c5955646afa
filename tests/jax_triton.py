"""Tests that trace Triton kernels, where jax-triton can be imported."""

import pytest


def require_jax_triton() -> None:
    """Skips a test where jax-triton cannot be imported: its version 0.3, the newest for Python 3.11, wants a GPU."""
    try:
        import jax_triton  # noqa: F401
    except ImportError as error:
        pytest.skip(f"jax-triton 0.3 cannot be imported without a GPU: {error}")
