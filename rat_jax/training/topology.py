"""TPUs that are not there, to compile for: the devices of a named topology."""

import importlib.util
import os
from importlib import metadata

import jax
from jax.experimental import topologies

from rat_jax.errors import RatJaxError

# What libtpu else asks the cloud's metadata server about this machine, and complains about where nobody answers; and it
# locks the machine's TPUs. None of it matters to what is compiled.
_WITHOUT_TPUS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


class TopologyError(RatJaxError, ValueError):
    """A topology whose devices cannot be had; the message says what to install or to write."""


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of a TPU topology, such as v5e:16x16 or v5p:4x4x4, as libtpu knows them.

    What else this process does with JAX runs on the CPU from here on, if it has not begun.

    Raises:
      TopologyError: if libtpu is not installed, or does not know the name.
    """
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise TopologyError(f"--topology={name}: libtpu compiles for TPUs, and is not installed: {_advice()}")
    for variable, value in _WITHOUT_TPUS.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
    # The two cores of a v4 chip are one device to its users, as they are of later chips.
    settings = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **settings).devices)
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        raise TopologyError(
            f"--topology={name}: libtpu has no such topology ({error}); names are like v5e:16x16, v6e:8x8, v5p:4x4x4"
        ) from None


def _advice() -> str:
    """How to install the libtpu that the installed jax names."""
    named = [line.split(";")[0].strip() for line in metadata.requires("jax") or () if line.startswith("libtpu")]
    return f"pip install '{named[0] if named else 'jax[tpu]'}'"
