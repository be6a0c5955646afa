"""Compiled programs that a later process runs without tracing them: JAX's cache is asked only after tracing.

A program's key names all that it follows from: the sources of this project, the versions of what compiles, the devices,
JAX's settings, the model's config, and the shapes, dtypes and places of the arguments. Where any of it differs the
program is not found, and is traced and compiled as ever. Functions that were replaced in a running process are not
seen, so that only programs that start from files (`generate.py`) use a store.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import pathlib
import pickle
import sys
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import serialize_executable

from rat_jax.compilation_cache import ProgramFiles, compiling_anew, say
from rat_jax.config import ModelConfig
from rat_jax.files import explain
from rat_jax.mixers import MIXERS

_PACKAGES = ("rat_jax", "pallas_kernels")
_COMPILERS = ("jax", "jaxlib", "flax", "numpy", "jax-triton", "triton", "libtpu")
_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin")
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_ANEW = {"xla_dump_max_hlo_modules": -1}  # XLA's default; named, it keeps JAX from taking what this process has
_REGISTERING = ("jaxlib.gpu_triton", "jax.experimental.mosaic.gpu")  # what programs with such kernels call


class ProgramStore:
    """Files of programs of one model, found by function and arguments."""

    def __init__(self, files: ProgramFiles, config: ModelConfig):
        """Takes the folder's files and the model's config."""
        self._files, self._about = files, f"{_environment()}\n{config!r}"

    def key(self, function: Any, arguments: Any) -> str:
        """Of a compiled function (`jax.jit`) for arguments like these."""
        leaves, treedef = jax.tree.flatten(arguments)
        about = [self._about, function.__module__, function.__qualname__, str(treedef), *map(_describe, leaves)]
        return f"{function.__name__}-" + hashlib.sha256("\n".join(about).encode()).hexdigest()

    def get(self, key: str, devices: Sequence[jax.Device]) -> jax.stages.Compiled | None:
        """The program of a key, which takes the arguments without the static ones; None if it is not there.

        Args:
          key: of a function and arguments.
          devices: that the arguments are on, in the order of their mesh.
        """
        content = self._files.get(key)
        if content is None:
            return None
        try:
            modules, *program = pickle.loads(content)
            for module in modules:
                importlib.import_module(module)
            return serialize_executable.deserialize_and_load(*program, execution_devices=list(devices))
        except Exception as error:  # of any sort: the program is compiled anew, whatever it is
            say(f"a program is compiled again, as it cannot be loaded: {explain(error)}")
            return None

    def compile(self, key: str, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """Compiles a program and keeps it, where its platform can write it down."""
        with compiling_anew():
            compiled = lowered.compile(_ANEW)
        modules = [name for name in _REGISTERING if name in sys.modules]
        with contextlib.suppress(Exception):  # of any sort, from platforms without files of programs
            self._files.put(key, pickle.dumps((modules, *serialize_executable.serialize(compiled))))
        return compiled


def _describe(leaf: Any) -> str:
    """Shape, dtype and place of an argument."""
    sharding = getattr(leaf, "sharding", None)
    return f"{jax.typeof(leaf)} {sharding!r}"


@functools.cache
def _environment() -> str:
    """All that programs follow from but the model and the arguments."""
    device, values = jax.devices()[0], jax.config.values
    facts = [f"Python {sys.version}", device.platform, device.device_kind, device.client.platform_version]
    facts += [repr(jax.devices()), f"multiprocessors={getattr(device, 'core_count', None)}"]  # some kernels need all
    for name in (*_COMPILERS, *_PLUGINS):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts.append(f"{name} {importlib.metadata.version(name)}")
    facts += [f"{name}={os.environ.get(name)}" for name in _VARIABLES]
    facts += [f"{name}={values[name]}" for name in sorted(values) if "cache" not in name]
    facts += [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in _sources()]
    return "\n".join(facts)


def _sources() -> list[pathlib.Path]:
    """Files of the packages, and of mixers that come from elsewhere."""
    files = {pathlib.Path(inspect.getfile(mixer)) for mixer in MIXERS.values()}
    for package in _PACKAGES:
        for folder in importlib.util.find_spec(package).submodule_search_locations:
            files |= set(pathlib.Path(folder).rglob("*.py"))
    return sorted(files)
