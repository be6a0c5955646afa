"""Settings of every test: the CPU unless told otherwise, quick compilation, checked annotations, no change of rank."""

import gc
import importlib.metadata
import importlib.util
import os

# Imports and traces make millions of objects that stay: at Python's threshold a tenth of the time goes into looking
# for others among them.
gc.set_threshold(50_000, 20, 20)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# References in PyTorch and NumPy are loops of small operations: two threads take six times the CPU time of one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # nothing depends on what earlier runs left, nor leaves something
ON_CPU = os.environ["JAX_PLATFORMS"] == "cpu"
# The suite compiles thousands of small programs and runs each for milliseconds: its time is that of compiling them.
# `make test-optimized` sets DEFAULT_COMPILATION and runs a part of them compiled as users' programs are.
QUICK_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# XLA cuts a program in 32 parts that threads compile, each with costs of its own: workers share the cores already.
QUICK_COMPILATION += " --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know this flag
    QUICK_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
if ON_CPU and "DEFAULT_COMPILATION" not in os.environ:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_COMPILATION}"

import jax  # noqa: E402 (the settings above come first)
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# An environment for an accelerator may lack beartype; the suite of the CPU does not pass without it.
if ON_CPU or importlib.util.find_spec("beartype") is not None:
    import tests.annotations  # noqa: F401 (the hook looks it up by name)

    jaxtyping.install_import_hook(["rat_jax"], "tests.annotations.checked")


def pytest_make_parametrize_id(val, argname):
    """Bytes are named by their argument: gzip writes the time into its output, and pytest-xdist wants equal names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture
def annotations_unchecked():
    """For tests of what the code itself says to arguments of other shapes than it names."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def as_host(monkeypatch):
    """Calls a function as one of two hosts, the first before the second, which hears what the first sent.

    What hosts gather is the same of both.
    """
    sent = []

    def call(index, function):
        if index == 0:
            sent.clear()
        heard = iter(sent)

        def broadcast(value):
            if index == 0:
                sent.append(np.array(value))
                return value
            first = next(heard)
            assert (value.shape, value.dtype) == (first.shape, first.dtype)
            return first

        with monkeypatch.context() as patch:
            patch.setattr(jax, "process_count", lambda: 2)
            patch.setattr(jax, "process_index", lambda: index)
            patch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)
            patch.setattr(multihost_utils, "process_allgather", lambda value: np.stack([value, value]))
            return function()

    return call


@pytest.fixture
def hopper():
    """The GPU at hand, if Mosaic GPU kernels are for it."""
    capability = jax.devices()[0].compute_capability
    if capability != "9.0":
        pytest.skip(f"the kernels are for compute capability 9.0, not {capability}")
