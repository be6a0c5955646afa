"""Settings of every test: the CPU unless told otherwise, quick compilation, no silent change of rank."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The suite compiles thousands of small programs and runs each for milliseconds: its time is that of compiling them.
# `make test-optimized` sets DEFAULT_COMPILATION and runs a part of them compiled as users' programs are.
QUICK_COMPILATION = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)
if os.environ["JAX_PLATFORMS"] == "cpu" and "DEFAULT_COMPILATION" not in os.environ:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_COMPILATION}"

import jax  # noqa: E402 (the settings above come first)

jax.config.update("jax_numpy_rank_promotion", "raise")
