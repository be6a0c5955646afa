"""Weights in folders of safetensors files, as models are exchanged: no PyTorch, no optimizer.

FOLDER/
  model.safetensors                   all arrays; or, where they are more than 5 GB,
  model-00001-of-00003.safetensors    a part of them each, with
  model.safetensors.index.json        the file of each array
  tokenizer/                          the model's, where it is known

Arrays have the names and shapes that they have in checkpoints (layers of one place in the pattern are stacked along the
first axis) and are float32 or bfloat16. The header of every file holds the format's version, the config, the step and a
checksum of all that is in the file.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
import stat
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rat_jax.checkpoints.arrays import description, differences, named
from rat_jax.checkpoints.store import abstract_model
from rat_jax.checkpoints.workdir import CheckpointError
from rat_jax.config import Config, config_from_dict, config_to_dict
from rat_jax.data.chat_template import ChatTemplate, load_chat_template
from rat_jax.data.new_folder import new_folder
from rat_jax.data.tokenizer import Tokenizer, load_tokenizer
from rat_jax.files import ContentError, FileError, explain, read_object, system_errors, write_json
from rat_jax.model import LanguageModel

FORMAT_VERSION = 1
ONE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # of the arrays in a file, unless one array alone has more
_TOKENIZER = "tokenizer"
_VERSION_KEY, _CHECKSUM_KEY = "rat_jax_format_version", "checksum"
HEADER_KEYS = (_VERSION_KEY, "config", "step", _CHECKSUM_KEY)
_DTYPES = {"F32": "float32", "BF16": "bfloat16"}
_STEP = re.compile(r"0|[1-9][0-9]{0,14}")


@dataclasses.dataclass(frozen=True)
class Weights:
    """A folder of weights: its headers fit together, and name the arrays that the model of their config has."""

    path: pathlib.Path
    config: Config  # that the model was trained with
    step: int  # optimizer steps that the model was trained for
    files: dict[str, dict[str, list[Any]]]  # file, name -> [shape, dtype]

    @classmethod
    def open(cls, path: pathlib.Path) -> "Weights":
        """Reads the headers of a folder's files, not their arrays.

        Raises:
          CheckpointError: if they are missing, damaged, of another format, of several models, or hold arrays of other
            names, shapes or dtypes than the model of their config has.
          FileError: if the system refuses.
        """
        places = _file_of_each_array(path)
        names = [ONE_FILE] if places is None else sorted(set(places.values()))
        headers = {name: _read_header(path / name) for name in names}
        first = headers[names[0]]
        for name, header in headers.items():
            if (header.config, header.step) != (first.config, first.step):
                raise CheckpointError(f"{path / name} is of another model or step than {names[0]} beside it")
            listed = header.arrays if places is None else [array for array, file in places.items() if file == name]
            if set(listed) != set(header.arrays):
                raise CheckpointError(f"{path / name} holds other arrays than {path / INDEX_FILE} says")
        shapes = {name: shape for header in headers.values() for name, (shape, _) in header.arrays.items()}
        there = {name: [shape, "float32"] for name, shape in shapes.items()}  # as which each is read
        if differing := differences(there, description(named(abstract_model(first.config.model)[1]))):
            raise CheckpointError(f"{path} holds other arrays than the model of its config has: {differing}")
        return cls(path, first.config, first.step, {name: header.arrays for name, header in headers.items()})

    @property
    def dtypes(self) -> list[str]:
        """The dtypes of the arrays."""
        return sorted({dtype for arrays in self.files.values() for _, dtype in arrays.values()})

    @property
    def tokenizer(self) -> pathlib.Path:
        """Folder of the tokenizer, if it is known."""
        return self.path / _TOKENIZER

    def load_tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None if it is not known.

        Raises:
          DataError: if it is damaged.
          CheckpointError: if it is of another model.
        """
        if not self.tokenizer.exists():
            return None
        tokenizer = load_tokenizer(self.tokenizer)
        if tokenizer.vocab_size != self.config.model.vocab_size:
            raise CheckpointError(
                f"the tokenizer in {self.tokenizer} has a vocabulary of {tokenizer.vocab_size:,}, the model of "
                f"{self.config.model.vocab_size:,}: it belongs to another model"
            )
        return tokenizer

    def load_chat_template(self) -> ChatTemplate | None:
        """What makes texts of chats for the model; None if there is none. Errors as of `load_tokenizer`."""
        return load_chat_template(self.tokenizer)

    def verify(self) -> None:
        """Reads all files, one array in memory at a time, and compares their checksums.

        Raises:
          CheckpointError, FileError: as of `read`.
          DataError: if the tokenizer or the chat template is damaged.
        """
        self.load_tokenizer()
        self.load_chat_template()
        for name in self.files:
            for _ in _read_arrays(self.path / name):
                pass

    def read(self) -> dict[str, np.ndarray]:
        """All arrays by name, in float32.

        Raises:
          CheckpointError: if a file has changed since it was written.
          FileError: if the system refuses.
        """
        return {
            name: array.astype(np.float32, copy=False)
            for file in self.files
            for name, array in _read_arrays(self.path / file)
        }

    def model(self) -> LanguageModel:
        """The model, on the default device; errors as of `read`."""
        graphdef, target = abstract_model(self.config.model)
        arrays = self.read()
        params = [jnp.asarray(arrays[name]) for name in named(target)]
        return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(target), params))


def write_weights(
    folder: pathlib.Path,
    config: Config,
    model: LanguageModel,
    step: int,
    tokenizer: Tokenizer | None = None,
    chat_template: ChatTemplate | None = None,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder of weights, which is complete or not there however this ends.

    Args:
      folder: missing or empty.
      config: that the model was trained with.
      model: its parameters are float32.
      step: optimizer steps that the model was trained for.
      tokenizer: of the model, if it is known.
      chat_template: what makes texts of chats, written beside the tokenizer.
      dtype: of the arrays in the files; bfloat16 rounds to the nearest.
      shard_bytes: of the arrays in a file.

    Raises:
      CheckpointError: if the folder holds something.
      FileError: if the system refuses.
    """
    check_new(folder)
    arrays = named(nnx.state(model))
    sizes = {name: array.size * jnp.dtype(dtype).itemsize for name, array in arrays.items()}
    parts = _parts(sizes, shard_bytes)
    places = {}
    with new_folder(folder) as partial:
        for number, names in enumerate(parts, 1):
            file = ONE_FILE if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            part = {name: np.ascontiguousarray(np.asarray(arrays[name]).astype(jnp.dtype(dtype))) for name in names}
            _write_file(partial / file, folder / file, part, config, step)
            places |= dict.fromkeys(names, file)
        if len(parts) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
            write_json(partial / INDEX_FILE, index)
        if tokenizer is not None:
            with system_errors(folder / _TOKENIZER, "made"):
                (partial / _TOKENIZER).mkdir()
            tokenizer.save(partial / _TOKENIZER)
            if chat_template is not None:
                chat_template.save(partial / _TOKENIZER)


def check_new(folder: pathlib.Path) -> None:
    """Refuses to write over anything.

    Raises:
      CheckpointError: if the folder holds something, or is no folder.
      FileError: if the system refuses to look.
    """
    with system_errors(folder, "read"):
        if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
            raise CheckpointError(f"{folder} is there already and not empty; it is left as it is")


def is_weights(path: pathlib.Path) -> bool:
    """Whether a folder looks like one of weights."""
    return (path / ONE_FILE).exists() or (path / INDEX_FILE).exists()


class _Header(NamedTuple):
    """What a file says of itself."""

    config: Config
    step: int
    arrays: dict[str, list[Any]]  # name -> [shape, dtype]


def _parts(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names of the arrays of each file, in order."""
    parts, room = [], 0
    for name, size in sizes.items():
        if not parts or size > room:
            parts.append([])
            room = limit
        parts[-1].append(name)
        room -= size
    return parts


def _write_file(path: pathlib.Path, final: pathlib.Path, arrays: dict[str, np.ndarray], config: Config, step: int):
    metadata = {_VERSION_KEY: str(FORMAT_VERSION), "config": json.dumps(config_to_dict(config)), "step": str(step)}
    checksum = _Checksum(metadata)
    for name in sorted(arrays):
        checksum.add(name, arrays[name])
    try:
        path.touch()
        mode = stat.S_IMODE(path.stat().st_mode)
        save_file(arrays, path, metadata | {_CHECKSUM_KEY: checksum.hex()})
        path.chmod(mode)  # as any new file's; the library makes files that their owner alone may read
    except (OSError, SafetensorError) as error:
        raise FileError(f"{final} cannot be written: {explain(error)}") from error


def _file_of_each_array(path: pathlib.Path) -> dict[str, str] | None:
    """What the index says; None where all arrays are in one file."""
    with system_errors(path, "read"):
        if not path.is_dir():
            raise CheckpointError(f"there is no folder {path}" if not path.exists() else f"{path} is no folder")
        has_one, has_index = (path / ONE_FILE).exists(), (path / INDEX_FILE).exists()
    if has_one == has_index:
        what = "both" if has_one else "neither"
        raise CheckpointError(f"{path} must hold {ONE_FILE} or {INDEX_FILE}: it holds {what}")
    if has_one:
        return None
    try:
        places = read_object(path / INDEX_FILE).get("weight_map")
    except ContentError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path / INDEX_FILE} is damaged: it has no weight_map")
    for file in places.values():
        if not isinstance(file, str) or pathlib.PurePath(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path / INDEX_FILE} is damaged: {file!r} is not the name of a file beside it")
    return places


def _read_header(path: pathlib.Path) -> _Header:
    with _opened(path) as file:
        metadata = file.metadata() or {}
        arrays = {}
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            array = file.get_slice(name)
            if array.get_dtype() not in _DTYPES:
                raise CheckpointError(f"{path}: {name} is {array.get_dtype()}, not {' or '.join(_DTYPES)}")
            arrays[name] = [list(array.get_shape()), _DTYPES[array.get_dtype()]]
    version = metadata.get(_VERSION_KEY)
    if version is None:
        raise CheckpointError(
            f"{path} was not written here: its header has no {_VERSION_KEY}, and without a config no model can be made"
        )
    if version != str(FORMAT_VERSION):
        raise CheckpointError(f"{path} has format version {version}; this code reads {FORMAT_VERSION}")
    if wrong := sorted(set(metadata) ^ set(HEADER_KEYS)):
        what = "missing" if wrong[0] in HEADER_KEYS else "no field of it"
        raise CheckpointError(f"{path}: the header is damaged: {wrong[0]} is {what}")
    try:
        config = config_from_dict(json.loads(metadata["config"]))
    except (ValueError, RecursionError) as error:  # of JSON, too
        raise CheckpointError(f"{path}: the config in its header cannot be used: {error}") from None
    if not _STEP.fullmatch(metadata["step"]):
        raise CheckpointError(f"{path}: step in its header must be a whole number, got {metadata['step']!r}")
    return _Header(config, int(metadata["step"]), arrays)


def _read_arrays(path: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a file; fails after the last if one of them, or the header, is not as it was written."""
    with _opened(path) as file:
        metadata = file.metadata()
        written = metadata.pop(_CHECKSUM_KEY, None)
        checksum = _Checksum(metadata)
        for name in sorted(file.keys()):
            array = file.get_tensor(name)
            checksum.add(name, array)
            yield name, array
    if written != checksum.hex():
        raise CheckpointError(f"{path} is damaged: its content has changed since it was written (the checksum differs)")


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    """A file of safetensors; what is wrong with it, found within the block too, is one line."""
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}") from None
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path} cannot be read: {explain(error)}") from error
    except SafetensorError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is damaged, or not a file of safetensors: {reason}") from None


class _Checksum:
    """SHA-256 of a header's metadata and of its arrays, in the order of their names."""

    def __init__(self, metadata: Mapping[str, str]):
        self._hash = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())

    def add(self, name: str, array: np.ndarray) -> None:
        self._hash.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        self._hash.update(array.reshape(-1).view(np.uint8))

    def hex(self) -> str:
        return self._hash.hexdigest()
