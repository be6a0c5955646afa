"""What tasks of a folder are made of: their files, and the data files beside them."""

import hashlib
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from rat_jax.files import system_errors

_KINDS = (".yaml", ".yml", ".py")  # task files, what they include, and the functions that they name


def hash_of_files(folder: pathlib.Path, data_files: Iterable[Any]) -> str:
    """SHA-256, in hexadecimal, of the names and contents of a folder's task files, and of the contents of data files.

    Args:
      folder: of task files, whose own folders count as well.
      data_files: what task files say under `data_files`, of local data: paths, lists of them, or such by split. Those
        that are no file of this machine (patterns, addresses) count by their names.

    Raises:
      FileError: if the system refuses to read one.
    """
    digest = hashlib.sha256()

    def add(name: str, path: pathlib.Path) -> None:
        with system_errors(path, "read"), path.open("rb") as file:
            digest.update(f"{name}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())

    with system_errors(folder, "read"):
        files = sorted(path for path in folder.rglob("*") if path.suffix in _KINDS and path.is_file())
    for path in files:
        add(path.relative_to(folder).as_posix(), path)
    for name in _paths(list(data_files)):
        if (path := pathlib.Path(name)).is_file():
            add(name, path)
        else:
            digest.update(f"{name}\n".encode())
    return digest.hexdigest()


def _paths(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case list():
            for item in value:
                yield from _paths(item)
        case dict():
            for item in value.values():
                yield from _paths(item)
