"""Files in which the PyTorch release keeps a model: weights under `task`, configuration under `config`, and `step`.

torch is imported only where such a file is read or written. Files come from strangers and hold pickles, so that nothing
but arrays, plain values and `EasyDict` is read from them.
"""

import collections
import contextlib
import dataclasses
import os
import pathlib
import pickle
import re
import struct
import sys
import types
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rat_jax.errors import RunStopped, shown
from rat_jax.files import explain, system_errors
from rat_jax.release.model_config import ReleaseError

_WEIGHTS, _CONFIG, _MODEL, _STEP = "task", "config", "model", "step"
_STEP_LIMIT = 2**31
_SAFE_TORCH = (2, 6)  # earlier ones run code from files even with weights_only (CVE-2025-32434)

# What readers of archives and pickles raise for bytes that nobody wrote.
_DAMAGE = (
    RuntimeError,  # RecursionError, too
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    ImportError,
    struct.error,
    zlib.error,
)

# The release's configurations are of the class EasyDict of the package easydict, a dict. torch fills no dict of an
# unknown class, so that an OrderedDict is made where a file says EasyDict; where the package is missing, the class
# below is written in its name.
_READ_AS = (collections.OrderedDict, "easydict.EasyDict")
_EasyDict = type("EasyDict", (dict,), {"__module__": "easydict"})


@dataclasses.dataclass(frozen=True)
class ReleaseFile:
    """What of a file is used here."""

    state_dict: Mapping[str, np.ndarray]  # float32, by the release's names
    model_config: Mapping[str, Any]  # the configuration's `model`
    step: int  # optimizer steps done; 0 where the file does not tell


def read_release_file(path: pathlib.Path | str) -> ReleaseFile:
    """Reads a file of the release without running anything that it holds.

    Raises:
      ReleaseError: if torch is missing or too old, or the file is missing, damaged, or holds something else.
    """
    torch = _import_torch()
    path = pathlib.Path(path)
    if not path.is_file():
        raise ReleaseError(f"there is no file {path}")
    _check_archive(path)
    try:
        with torch.serialization.safe_globals([_READ_AS]):
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = f"{name[1]}, which" if name else "something that"
        raise ReleaseError(f"{path} holds {what} is neither an array nor a setting; nothing of it was run") from None
    except _DAMAGE as error:
        raise ReleaseError(f"{path} is damaged, or not a file of torch.save: {_first_line(error)}") from None
    if not isinstance(contents, Mapping):
        raise ReleaseError(f"{path} holds a {type(contents).__name__}, not a dictionary with {_WEIGHTS} and {_CONFIG}")
    weights = _entry(contents, (_WEIGHTS,), path)
    step = contents.get(_STEP, 0)
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < _STEP_LIMIT:
        raise ReleaseError(f"{path}: {_STEP} must be a whole number of 0 or more, below 2**31, got {shown(step)}")
    arrays = {name: _array(torch, value, f"{path}: {_WEIGHTS}.{name}") for name, value in weights.items()}
    return ReleaseFile(arrays, _entry(contents, (_CONFIG, _MODEL), path), step)


def check_new(path: pathlib.Path) -> None:
    """Refuses to write over a file, or where there is no folder.

    Raises:
      ReleaseError: naming it.
    """
    if path.exists():
        raise ReleaseError(f"{path} is there already; it is left as it is")
    if not path.parent.is_dir():
        raise ReleaseError(f"{path} cannot be written: there is no folder {path.parent}")


def write_release_file(path: pathlib.Path | str, contents: ReleaseFile) -> None:
    """Writes a new file as the release would.

    Raises:
      ReleaseError: if torch is missing, the file is there already, or the system refuses to make it.
      RunStopped: if the system refuses later; nothing is left of it.
    """
    torch = _import_torch()
    path = pathlib.Path(path)
    check_new(path)
    task = {
        "_name_": "lm",
        "tie_embedding": True,
        "ignore_index": -100,
        "loss": {"_name_": "cross_entropy", "ignore_index": -100},
        "metric": {"_name_": "ppl", "ignore_index": -100},
    }
    partial = path.with_name(path.name + ".partial")
    try:
        with _easydict_module() as easy_dict:
            values = {
                _WEIGHTS: {name: torch.from_numpy(array) for name, array in contents.state_dict.items()},
                _CONFIG: _nested(easy_dict, {_MODEL: contents.model_config, "task": task}),
                _STEP: contents.step,
            }
            torch.save(values, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        begun = partial.exists()
        with contextlib.suppress(OSError):  # the first error is the one to report
            partial.unlink(missing_ok=True)
        reason = explain(error) if isinstance(error, OSError) else _first_line(error)
        if begun:
            raise RunStopped(f"{path} cannot be written: {reason}; nothing is left of it") from None
        raise ReleaseError(f"{path} cannot be written: {reason}") from None


def _check_archive(path: pathlib.Path) -> None:
    """Reads the whole archive and compares its checksums, which torch does not do.

    Raises:
      ReleaseError: if it is no archive, or a part of it has changed.
    """
    with system_errors(path, "read"):
        if not zipfile.is_zipfile(path):
            raise ReleaseError(f"{path} is damaged, or not a file of torch.save")
    try:
        with zipfile.ZipFile(path) as archive:
            if packed := [part.filename for part in archive.infolist() if part.compress_type != zipfile.ZIP_STORED]:
                raise ReleaseError(f"{path} is not a file of torch.save: {packed[0]} in it is compressed")
            changed = archive.testzip()
    except (zipfile.BadZipFile, OSError, *_DAMAGE) as error:
        raise ReleaseError(f"{path} is damaged, or not a file of torch.save: {_first_line(error)}") from None
    if changed is not None:
        raise ReleaseError(f"{path} is damaged: the checksum of {changed} in it is another; get the file again")


def _array(torch: Any, value: Any, name: str) -> np.ndarray:
    """A float32 array; of dense tensors of real numbers only."""
    if not isinstance(value, torch.Tensor):
        raise ReleaseError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_quantized or value.is_nested or value.device.type != "cpu":
        kind = "quantised" if value.is_quantized else f"{value.layout} on {value.device}"
        raise ReleaseError(f"{name} must be a dense tensor, got a {kind} one")
    if not value.is_floating_point():
        raise ReleaseError(f"{name} must be of real numbers, got {value.dtype}")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ReleaseError(f"{name} has shape {tuple(value.shape)}, more than is stored of it")
    return value.detach().to(torch.float32).numpy()


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _import_torch() -> Any:
    try:
        import torch
    except ImportError:
        raise ReleaseError("files of the release need torch: pip install torch") from None
    if tuple(int(number) for number in torch.__version__.split(".")[:2]) < _SAFE_TORCH:
        raise ReleaseError(
            f"torch {torch.__version__} may run code from the files it reads; version "
            f"{'.'.join(map(str, _SAFE_TORCH))} or later is needed"
        )
    return torch


def _entry(contents: Mapping[str, Any], keys: tuple[str, ...], path: pathlib.Path) -> Mapping[str, Any]:
    for i, key in enumerate(keys):
        name = ".".join(keys[: i + 1])
        if key not in contents:
            raise ReleaseError(f"{path} has no {name}; it has {shown(list(contents))}")
        contents = contents[key]
        if not isinstance(contents, Mapping):
            raise ReleaseError(f"{path}: {name} must be a dictionary, got a {type(contents).__name__}")
    return contents


@contextlib.contextmanager
def _easydict_module() -> Iterator[type]:
    """The class to write configurations with, under the name by which a reader looks for it."""
    try:
        import easydict
    except ImportError:
        pass
    else:
        yield easydict.EasyDict
        return
    module = types.ModuleType("easydict")
    module.EasyDict = _EasyDict
    sys.modules["easydict"] = module
    try:
        yield _EasyDict
    finally:
        del sys.modules["easydict"]


def _nested(cls: type, values: Mapping[str, Any]) -> Mapping[str, Any]:
    return cls({key: _nested(cls, value) if isinstance(value, Mapping) else value for key, value in values.items()})
