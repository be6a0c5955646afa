"""Which files a path, a folder or a glob pattern names."""

import glob
import os
import pathlib
from collections.abc import Callable

from rat_jax.data import DataError
from rat_jax.data.utf8_file import compression
from rat_jax.files import explain
from rat_jax.paths import local_path


def find_files(
    pattern: str, is_wanted: Callable[[pathlib.Path], bool], wanted: str, note: Callable[[str], None]
) -> tuple[pathlib.Path, ...]:
    """The file of that name, the wanted files below a folder, or all those that a glob pattern matches; sorted.

    Below a folder what is hidden is left out, and links to folders are followed, each folder once.

    Args:
      pattern: as the user wrote it.
      is_wanted: of the files below a folder.
      wanted: what they are called, for messages.
      note: is told of the links that are followed, in a line each.

    Raises:
      DataError: if there is none, or a link leads nowhere.
      PathError: if it is no path of this machine.
    """
    path = local_path(pattern, "a source") if pattern else None
    try:
        if path is None:
            found = []
        elif path.is_dir():
            found = [file for file in _below(path, note) if is_wanted(file)]
        elif path.exists():
            found = [path]
        else:
            found = [pathlib.Path(name) for name in glob.glob(str(path), recursive=True)]
            found = _each_once([file for file in found if not file.is_dir()], note)
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {explain(error)}") from None
    if not found:
        raise DataError(f"source {pattern}: no such file, and no folder or pattern with {wanted}")
    for file in found:
        if file.is_symlink() and not file.exists():
            raise DataError(
                f"{file} cannot be read: No such file or directory: it is a link to {os.readlink(file)}; mend or "
                f"remove the link"
            )
    return tuple(sorted(found, key=pathlib.PurePath.as_posix))


def ending(path: pathlib.Path) -> str:
    """What follows the last point of a file's name, in small letters, a compression's ending left out."""
    inner = pathlib.PurePath(path.stem) if compression(path) else path
    return inner.suffix.lower()


def _each_once(files: list[pathlib.Path], note: Callable[[str], None]) -> list[pathlib.Path]:
    """Without those that links to folders, which `**` follows even in loops, lead to again."""
    kept: dict[pathlib.Path, pathlib.Path] = {}
    for file in sorted(files, key=lambda file: (len(file.parts), file.as_posix())):
        kept.setdefault(pathlib.Path(os.path.realpath(file.parent), file.name), file)
    if len(kept) < len(files):
        note(f"links to folders lead to files that are read already: {len(files) - len(kept):,} names are left out")
    return list(kept.values())


def _below(folder: pathlib.Path, note: Callable[[str], None]) -> list[pathlib.Path]:
    """The files below a folder that are not hidden. Linked folders come last: a folder keeps its own name."""
    files: list[pathlib.Path] = []
    read: set[tuple[int, int]] = set()
    links = [folder]
    while links:
        start = links.pop(0)
        if _identity(start) in read:
            note(f"the link {start} leads to a folder that is read already")
            continue
        if start != folder:
            note(f"following the link {start} to {os.path.realpath(start)}")
        more: list[pathlib.Path] = []
        for name, folders, names in os.walk(start, onerror=_raise):
            here = pathlib.Path(name)
            folders[:] = sorted(each for each in folders if not each.startswith("."))
            if here != start and _identity(here) in read:  # it lies below a folder that a link led to before
                folders.clear()
                continue
            read.add(_identity(here))
            more += [here / each for each in folders if (here / each).is_symlink()]
            files += [here / each for each in names if not each.startswith(".")]
        links += sorted(more, key=pathlib.PurePath.as_posix)
    return files


def _identity(folder: pathlib.Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _raise(error: OSError) -> None:
    raise error
