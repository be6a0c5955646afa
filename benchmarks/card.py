"""The device that a table was measured on: what it is, and the two rates that bound every row."""

import datetime
import os
import platform
import subprocess
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.timing import Times, time_calls

if TYPE_CHECKING:  # most benchmarks draw nothing
    from matplotlib.figure import Figure


class Ceilings(NamedTuple):
    """Measured rates."""

    copy_gb_per_s: float  # of an element-wise copy, bytes read and bytes written
    tflop_per_s: float  # of a bfloat16 matrix product

    def copy_ms(self, num_bytes: float) -> float:
        """Milliseconds to move bytes, each read or written once."""
        return num_bytes / self.copy_gb_per_s / 1e6

    def product_ms(self, operations: float) -> float:
        """Milliseconds of operations of matrix products."""
        return operations / self.tflop_per_s / 1e9


def share_memory() -> None:
    """Lets jax take device memory as it needs it, nearly all if it must; call it before the first use of a device."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")


def describe() -> str:
    """Device, date and versions, in one line."""
    versions = [f"Python {platform.python_version()}"]
    for package in ("jax", "flax", "jax-triton", "triton", "torch"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    device = jax.devices()[0].device_kind
    return ", ".join([device, *_clocks(), datetime.date.today().isoformat(), *versions])


def caption(dtype: str) -> str:
    """Device, dtype and date: what a picture says below its panels."""
    return f"{jax.devices()[0].device_kind}, {dtype}, {datetime.date.today().isoformat()}"


def write_caption(figure: "Figure", text: str) -> None:
    """Writes small at the lower right of a figure."""
    figure.supxlabel(text, x=0.99, ha="right", fontsize=8, color="gray")


def _clocks() -> list[str]:
    """The driver and the power limit, which decide how fast a GPU may run; nothing on other devices."""
    if jax.devices()[0].platform != "gpu":
        return []
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader", "--id=0"]
    try:
        driver, power = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    except (OSError, subprocess.CalledProcessError, ValueError):  # a container may lack the program
        return []
    return [f"driver {driver}", f"power limit {power}"]


def time_compiled(compiled: jax.stages.Compiled, arguments: tuple[Any, ...], repeats: int) -> Times:
    """Milliseconds of a compiled function that donates nothing."""
    return time_calls(lambda: compiled(*arguments), jax.block_until_ready, repeats)


def held_gb(compiled: jax.stages.Compiled) -> float:
    """Peak device memory of one call with its arguments and results, in GB; a donated argument counts once."""
    memory = compiled.memory_analysis()
    held = memory.temp_size_in_bytes + memory.output_size_in_bytes + memory.argument_size_in_bytes
    return (held - memory.alias_size_in_bytes) / 1e9


def measure_ceilings(repeats: int) -> Ceilings:
    """Both rates on this device: 16 side^2 values copied, two side x side matrices multiplied."""
    side = 1024 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (16 * side**2,), jnp.bfloat16)
    copy = jax.jit(lambda x: x + jnp.bfloat16(1)).lower(x).compile()
    copy_ms = time_compiled(copy, (x,), repeats).ms
    a = jax.random.normal(jax.random.key(1), (side, side), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a).lower(a).compile()
    product_ms = time_compiled(product, (a,), repeats).ms
    return Ceilings(4 * x.size / copy_ms / 1e6, 2 * side**3 / product_ms / 1e9)


def reason(error: Exception) -> str:
    """Why a row of a table could not be measured, in one line."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return "does not fit the memory of this device"
    if "cuDNN is not detected" in text:
        return "cuDNN needs an NVIDIA GPU"
    return f"{type(error).__name__}: {text}".replace("\n", " ")[:150]
