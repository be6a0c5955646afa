"""The manifest of a checkpoint: what it holds, and how to see that all of it is still there."""

import dataclasses
import json
import pathlib
import platform
from collections.abc import Callable, Collection
from typing import Any

import flax
import jax

from rat_jax.checkpoints.arrays import ORBAX_VERSION, REQUIRED_FILES
from rat_jax.checkpoints.digests import in_parallel, sha256, shares
from rat_jax.checkpoints.hosts import gathered, on_first_host
from rat_jax.checkpoints.workdir import CheckpointError
from rat_jax.config import Config, ConfigError, config_from_dict, config_to_dict
from rat_jax.data.json_object import checksum, is_digest
from rat_jax.files import ContentError, FileError, explain, read_object, write_json

FORMAT_VERSION = 4
# 1, 2: the config holds the settings of every mixer there was, whether the model has it or not; 1 lacks later fields.
# Both are read as they are: what is not there has its default, and what the model does not have is dropped.
# 4 has a checksum of the manifest itself, and is otherwise as 3.
_READ_VERSIONS = (1, 2, 3, FORMAT_VERSION)
MANIFEST_FILE = "manifest.json"
MODEL_ONLY_FOLDER = "0"  # where a model alone is saved, whatever its step: a run that starts from it saves later steps
ITEMS = ("params", "optimizer")


class VersionError(CheckpointError):
    """A checkpoint of a format that this code does not know: another version of the code does."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int  # optimizer steps done; where only a model was saved, those it says it was trained for
    config: Config
    data: dict[str, Any] | None  # `TrainData.state` after those steps; None where only a model was saved
    versions: dict[str, str]  # of the packages it was written with, and "devices" since there is such an entry
    arrays: dict[str, dict[str, list[Any]]]  # item, name -> [shape, dtype]
    files: dict[str, list[Any]]  # path -> [bytes, SHA-256]

    @classmethod
    def read(cls, path: pathlib.Path) -> "Manifest":
        """The manifest of a checkpoint's folder.

        Raises:
          CheckpointError: if it is missing, damaged, of another version or of another folder.
          FileError: if the system refuses to read it.
        """
        file = path / MANIFEST_FILE
        try:
            values = read_object(file)
        except FileNotFoundError:
            raise CheckpointError(f"{path} was not finished: it has no {MANIFEST_FILE}") from None
        except ContentError as error:
            raise CheckpointError(str(error)) from None
        return cls.of_values(values, path)

    @classmethod
    def of_values(cls, values: dict[str, Any], path: pathlib.Path) -> "Manifest":
        """The manifest of a checkpoint's folder from what its file holds; errors as of `read`."""
        file, values = path / MANIFEST_FILE, dict(values)
        version = values.pop("format_version", None)
        if type(version) is not int or version not in _READ_VERSIONS:
            known = ", ".join(map(str, _READ_VERSIONS))
            raise VersionError(f"{file} has format version {version}; this code reads {known}")
        try:
            if version >= 4 and values.pop("checksum", None) != checksum(values):
                raise _Damage("its content has changed since it was written (the checksum differs)")
            manifest = cls._checked(values)
        except (_Damage, ConfigError) as error:
            raise CheckpointError(f"{file} is damaged: {error}") from None
        if path.name != (folder := manifest.folder):
            raise CheckpointError(f"{file} is that of another checkpoint: its folder should be called {folder}")
        return manifest

    @property
    def folder(self) -> str:
        """The name of the checkpoint's folder."""
        return MODEL_ONLY_FOLDER if self.data is None else str(self.step)

    def write(self, path: pathlib.Path) -> None:
        """Writes it into a checkpoint's folder.

        Raises:
          FileError: if the system refuses.
        """
        write_json(path / MANIFEST_FILE, self.values())

    def values(self) -> dict[str, Any]:
        """What its file holds."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["config"] = config_to_dict(self.config)
        values = json.loads(json.dumps(values))  # tuples become lists, as they will be when it is read
        return {"format_version": FORMAT_VERSION, "checksum": checksum(values), **values}

    @classmethod
    def _checked(cls, values: dict[str, Any]) -> "Manifest":
        names = [field.name for field in dataclasses.fields(cls)]
        if wrong := sorted(set(names) ^ set(values)):
            raise _Damage(f"{wrong[0]} is {'missing' if wrong[0] in names else 'no field of it'}")
        step, data, versions = values["step"], values["data"], values["versions"]
        _require(_is_count(step), f"step must be a whole number of 0 or more, got {step!r}")
        _require(isinstance(values["config"], dict), "config must be an object")
        config = config_from_dict(values["config"])
        _require(
            isinstance(versions, dict) and all(isinstance(version, str) for version in versions.values()),
            "versions must be texts by name",
        )
        if data is not None:
            _check_data(data, step, config)
        _check_arrays(values["arrays"], ("params",) if data is None else ITEMS)
        _check_files(values["files"], values["arrays"])
        return cls(**values | {"config": config})

    def verify(
        self,
        path: pathlib.Path,
        *,
        contents: bool = True,
        unread: Collection[str] = (),
        names: Collection[str] | None = None,
    ) -> None:
        """Compares the files of a checkpoint with what was written.

        Args:
          path: of the checkpoint.
          contents: False looks at sizes alone.
          unread: items of which sizes suffice in any case.
          names: of the files to compare; None: all.

        Raises:
          CheckpointError: naming the first that is missing, cut short, changed or not listed.
          FileError: if the system refuses to read one that is there.
        """

        def damage_of(name: str) -> str | None:
            return self._damage(path, name, contents and name.partition("/")[0] not in unread)

        for damage in in_parallel(damage_of, self.files if names is None else names):
            if damage is not None:
                raise CheckpointError(f"{path} is damaged: {damage}")
        for item in self.arrays:
            for file in sorted((path / item).rglob("[!.]*")):  # what begins with a dot is the file system's own
                name = str(file.relative_to(path))
                if name not in self.files and file.is_file():
                    raise CheckpointError(f"{path} is damaged: its {MANIFEST_FILE} does not list {name}")

    def verify_together(self, path: pathlib.Path) -> None:
        """`verify` by all hosts, each of which reads a part; all must call this together, and all raise the same.

        Of damage that another host finds the first decides: a file system may show it a file later.

        Raises:
          CheckpointError: as `verify`.
          FileError: if the system refuses one of them to read, or if a host alone finds damage.
        """
        parts = shares({name: size for name, (size, _) in self.files.items()}, jax.process_count())
        damage, refusal = None, None
        try:
            self.verify(path, names=parts[jax.process_index()])
        except CheckpointError as error:
            damage = str(error)
        except FileError as error:
            refusal = str(error)
        found = gathered([damage, refusal])
        for number, (_, refusal) in enumerate(found):
            if refusal is not None:
                raise FileError(f"process {number}: {refusal}")
        if found[0][0] is not None:
            raise CheckpointError(found[0][0])
        for number, (damage, _) in enumerate(found):
            if damage is not None:
                on_first_host(lambda names=parts[number]: self.verify(path, names=names))
                raise FileError(
                    f"process {number} alone finds: {damage}. See that it has the same storage as process 0"
                )

    def _damage(self, path: pathlib.Path, name: str, contents: bool) -> str | None:
        """What is wrong with a file; None: nothing."""
        file, (size, digest) = path / name, self.files[name]
        try:
            found = file.stat().st_size if file.is_file() else None
            if found == size:
                return f"the content of {name} has changed" if contents and sha256(file) != digest else None
        except FileNotFoundError:
            found = None
        except OSError as error:
            raise FileError(f"{file} cannot be read: {explain(error)}") from error
        return f"{name} is missing" if found is None else f"{name} has {found} bytes, not {size}"


class _Damage(ValueError):
    """What is wrong with a manifest."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise _Damage(message)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _check_data(data: Any, step: int, config: Config) -> None:
    """One batch is taken for a step."""
    _require(
        isinstance(data, dict) and {"next_batch", "fingerprint"} <= set(data),
        "data must have next_batch and fingerprint",
    )
    _require(
        data["next_batch"] == step and type(data["next_batch"]) is int,
        f"data.next_batch must be step, {step}, got {data['next_batch']!r}",
    )
    _require(isinstance(data["fingerprint"], dict) and bool(data["fingerprint"]), "data.fingerprint must be an object")
    num_steps = config.training.num_steps
    _require(1 <= step <= num_steps, f"step must lie in 1 .. config.training.num_steps, {num_steps}, got {step}")


def _check_arrays(arrays: Any, items: tuple[str, ...]) -> None:
    _require(
        isinstance(arrays, dict) and set(arrays) == set(items), f"arrays must be those of {' and '.join(items)} alone"
    )
    for item, named in arrays.items():
        _require(isinstance(named, dict) and bool(named), f"arrays.{item} must be an object")
        for name, description in named.items():
            _require(_is_description(description), f"arrays.{item}.{name} must be a shape and a dtype")


def _is_description(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    shape, dtype = value
    return isinstance(shape, list) and all(map(_is_count, shape)) and isinstance(dtype, str)


def _check_files(files: Any, arrays: dict[str, Any]) -> None:
    _require(isinstance(files, dict), "files must be an object")
    for name, value in files.items():
        parts = pathlib.PurePosixPath(name).parts
        _require(
            bool(parts) and parts[0] != "/" and ".." not in parts, f"files.{name} must be a path inside the checkpoint"
        )
        _require(
            isinstance(value, list)
            and len(value) == 2
            and _is_count(value[0])
            and isinstance(value[1], str)
            and is_digest(value[1]),
            f"files.{name} must be a size and a SHA-256",
        )
    for item in arrays:
        for name in REQUIRED_FILES:
            _require(f"{item}/{name}" in files, f"files lacks {item}/{name}, without which there are no arrays")


def from_first_host(
    folder: pathlib.Path, find: Callable[[], tuple[pathlib.Path, Manifest] | None]
) -> tuple[pathlib.Path, Manifest] | None:
    """What the first host finds in a folder of checkpoints; the others are told, and need not see the same files yet.

    All hosts must call this together; errors as of `find`, see `on_first_host`.
    """

    def find_and_tell() -> str | None:
        found = find()
        return None if found is None else json.dumps(found[1].values())

    told = on_first_host(find_and_tell)
    if told is None:
        return None
    values = json.loads(told)
    path = folder / (MODEL_ONLY_FOLDER if values["data"] is None else str(values["step"]))
    return path, Manifest.of_values(values, path)


def versions_here() -> dict[str, str]:
    """Of what writes checkpoints in this process."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "orbax-checkpoint": ORBAX_VERSION,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
