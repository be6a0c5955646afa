"""Settings of every test of kernels."""

import jax
import pytest


@pytest.fixture(autouse=True)
def own_triton_cache(tmp_path_factory, monkeypatch):
    """Importing jax-triton empties this variable, without which triton itself launches nothing."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


@pytest.fixture
def hopper():
    """The GPU at hand, if Mosaic GPU kernels are for it."""
    capability = jax.devices()[0].compute_capability
    if capability != "9.0":
        pytest.skip(f"the kernels are for compute capability 9.0, not {capability}")
