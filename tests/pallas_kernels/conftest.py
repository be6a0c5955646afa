"""Settings of every test of kernels."""

import pytest


@pytest.fixture(autouse=True)
def own_triton_cache(tmp_path_factory, monkeypatch):
    """Importing jax-triton empties this variable, without which triton itself launches nothing."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))
