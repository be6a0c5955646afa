"""The manifest of a checkpoint: what it holds, and how to see that all of it is still there."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from rat_jax.checkpoints.workdir import CheckpointError
from rat_jax.config import Config, ConfigError, config_from_dict, config_to_dict
from rat_jax.files import write_json

FORMAT_VERSION = 3
# 1, 2: the config holds the settings of every mixer there was, whether the model has it or not; 1 lacks later fields.
# Both are read as they are: what is not there has its default, and what the model does not have is dropped.
_READ_VERSIONS = (1, 2, FORMAT_VERSION)
MANIFEST_FILE = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int  # optimizer steps done; where only a model was saved, those it says it was trained for
    config: Config
    data: dict[str, Any] | None  # `TrainData.state` after those steps; None where only a model was saved
    versions: dict[str, str]
    arrays: dict[str, dict[str, list[Any]]]  # item, name -> [shape, dtype]
    files: dict[str, list[Any]]  # path -> [bytes, SHA-256]

    @classmethod
    def read(cls, path: pathlib.Path) -> "Manifest":
        """The manifest of a checkpoint's folder.

        Raises:
          CheckpointError: if it is missing, damaged or of another version.
        """
        file = path / MANIFEST_FILE
        try:
            values = json.loads(file.read_text())
            if (version := values.pop("format_version")) not in _READ_VERSIONS:
                known = ", ".join(map(str, _READ_VERSIONS))
                raise CheckpointError(f"{file} has format version {version}; this code reads {known}")
            return cls(**values | {"config": config_from_dict(values["config"])})
        except FileNotFoundError:
            raise CheckpointError(f"{path} was not finished: it has no {MANIFEST_FILE}") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, ConfigError) as error:
            raise CheckpointError(f"{file} is damaged: {error}") from None

    def write(self, path: pathlib.Path) -> None:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["config"] = config_to_dict(self.config)
        write_json(path / MANIFEST_FILE, {"format_version": FORMAT_VERSION, **values})

    def verify(self, path: pathlib.Path) -> None:
        """Reads all files and compares them.

        Raises:
          CheckpointError: naming the first that is missing, cut short or changed.
        """
        for name, (size, digest) in self.files.items():
            file = path / name
            if not file.is_file():
                raise CheckpointError(f"{path} is damaged: {name} is missing")
            if file.stat().st_size != size:
                raise CheckpointError(f"{path} is damaged: {name} has {file.stat().st_size} bytes, not {size}")
            if sha256(file) != digest:
                raise CheckpointError(f"{path} is damaged: the content of {name} has changed")


def sha256(file: pathlib.Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
