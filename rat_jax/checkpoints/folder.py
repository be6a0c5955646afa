"""The folder of a run's checkpoints: what is in it, what is set aside, what is removed.

STEP                     a checkpoint, complete if it has a manifest
damaged-STEP             one whose files are not as its manifest says, left for a person to look at
unfinished-STEP          one without a manifest, likewise
removing-STEP            one that is being removed
*.orbax-checkpoint-tmp*  what never became a checkpoint

Only the last two, and complete checkpoints that are no longer to be kept, are ever removed.
"""

import contextlib
import pathlib
import re
import shutil
from collections.abc import Callable

from rat_jax.checkpoints.arrays import TEMPORARY
from rat_jax.checkpoints.manifest import MANIFEST_FILE, Manifest
from rat_jax.checkpoints.workdir import CheckpointError
from rat_jax.files import FileError, explain, system_errors

_STEP = re.compile(r"0|[1-9][0-9]*")
_DAMAGED, _UNFINISHED, _REMOVING = "damaged-", "unfinished-", "removing-"


def step_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints, newest first; none if there is no such folder.

    Raises:
      FileError: if the system refuses to look.
    """
    return sorted(filter(_is_step_folder, _entries(folder)), key=lambda path: -int(path.name))


def set_aside(path: pathlib.Path) -> pathlib.Path:
    """Gives a checkpoint that cannot be used another name, and returns that.

    Raises:
      FileError: if the system refuses.
    """
    kind = _DAMAGED if (path / MANIFEST_FILE).is_file() else _UNFINISHED
    aside, number = path.with_name(kind + path.name), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{kind}{path.name}-{number}")
    with system_errors(path, "moved"):
        return path.rename(aside)


def aside(folder: pathlib.Path) -> list[str]:
    """Names of what was set aside."""
    return [path.name for path in _entries(folder) if path.name.startswith((_DAMAGED, _UNFINISHED))]


def clean(folder: pathlib.Path, report: Callable[[str], None]) -> None:
    """Removes what never became a checkpoint and what was being removed, and names what is no run's.

    Raises:
      FileError: if the system refuses.
    """
    unknown = []
    for path in _entries(folder):
        if TEMPORARY in path.name and path.is_dir():
            report(f"removing {path}, which was not finished")
        elif not path.name.startswith(_REMOVING):
            if not _is_step_folder(path) and not path.name.startswith((_DAMAGED, _UNFINISHED, ".")):
                unknown.append(path.name)
            continue
        with system_errors(path, "removed"):
            shutil.rmtree(path)
    if unknown:
        report(f"{folder} holds {', '.join(unknown)}, which no run writes; left as it is")


def check_way(folder: pathlib.Path, step: int) -> None:
    """Refuses to go on from `step` where something that is no checkpoint has the name of a later one.

    Raises:
      CheckpointError: naming it.
    """
    for path in _entries(folder):
        if _STEP.fullmatch(path.name) and not path.is_dir() and int(path.name) > step:
            raise CheckpointError(f"{path} is no checkpoint but has the name of one: move it away")


def remove_old(folder: pathlib.Path, keep: int, report: Callable[[str], None]) -> None:
    """Removes complete checkpoints of a run beyond the `keep` newest; a model alone, which no run wrote, stays."""
    complete = []
    for path in step_folders(folder):
        with contextlib.suppress(CheckpointError, FileError):  # of those that are not complete
            if Manifest.read(path).data is not None:
                complete.append(path)
    for path in complete[keep:]:
        try:
            shutil.rmtree(path.rename(path.with_name(_REMOVING + path.name)))  # half of one has no checkpoint's name
        except OSError as error:  # the run goes on without that room
            report(f"{path} could not be removed: {explain(error)}")


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
    with system_errors(folder, "read"):
        return sorted(folder.iterdir()) if folder.is_dir() else []


def _is_step_folder(path: pathlib.Path) -> bool:
    return _STEP.fullmatch(path.name) is not None and path.is_dir()
