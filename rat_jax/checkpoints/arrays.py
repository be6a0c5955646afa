"""Arrays of a checkpoint on disk: written in the background, read into the shapes and places that are asked for.

Orbax, which does both, is used in this file alone, through its v0 interface. Its v1, which new code is advised to take,
is `orbax.checkpoint.experimental.v1` in the versions that requirements.txt names, and still renames its functions from
one version to the next. What it has beyond v0 (a response object for errors of background writes, loading a part of a
checkpoint) the checkpoints here have already: errors come from `ArrayWriter.wait`, and every item is a folder of its
own. Since v1 reads and writes the same arrays, moving needs no new format; it waits for v1 to leave `experimental`.
"""

import contextlib
import logging
import os
import pathlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from rat_jax.checkpoints.workdir import CheckpointError
from rat_jax.files import FileError, explain
from rat_jax.sharding import leaf_names

ORBAX_VERSION = ocp.__version__
TEMPORARY = ".orbax-checkpoint-tmp"  # in the names of what was never finished
_IN_PARTS = ocp.SaveArgs(chunk_byte_size=1 << 26)  # each is compressed and read by a thread: layers' arrays are large
REQUIRED_FILES = ("_METADATA", "manifest.ocdbt")  # of each item, without which its arrays are not found


class ArrayWriter:
    """Writes arrays in the background, one folder after the other. All hosts call it together."""

    def __init__(self):
        """Starts threads, which `close` ends."""
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(_quiet())
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())

    def start(self, path: pathlib.Path, items: dict[str, dict[str, jax.Array]]) -> None:
        """Begins to write PATH/ITEM for each item; the arrays may be donated as soon as this returns.

        Raises:
          CheckpointError: if it cannot begin.
        """
        arguments = {
            item: ocp.args.StandardSave(arrays, save_args=dict.fromkeys(arrays, _IN_PARTS))
            for item, arrays in items.items()
        }
        with write_errors(path):
            self._writer.save(path, args=ocp.args.Composite(**arguments))

    def wait(self, path: pathlib.Path) -> None:
        """Returns when what was begun is complete.

        Raises:
          CheckpointError: if it could not be written.
        """
        with write_errors(path):
            self._writer.wait_until_finished()

    def close(self) -> None:
        """Ends the threads, when nothing is being written."""
        with self._stack:
            self._writer.close()


def restore_arrays(path: pathlib.Path, saved: dict[str, list[Any]], target: Any) -> Any:
    """The arrays of an item in the structure, dtypes and shardings of an abstract `target`.

    Args:
      path: of the item.
      saved: shape and dtype of each by name, as the manifest says.
      target: a tree of `jax.ShapeDtypeStruct`.

    Raises:
      CheckpointError: if they have other names, shapes or dtypes, or cannot be read.
    """
    wanted = named(target)
    if differing := differences(saved, description(wanted)):
        raise CheckpointError(f"{path} holds other arrays than this code makes: {differing}")
    try:
        with _quiet(), ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(path, wanted)
    except (OSError, ValueError) as error:  # TensorStore's are ValueErrors
        raise CheckpointError(f"{path} could not be read: {explain(error)}") from error
    return jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in leaf_names(target)])


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their names in checkpoints."""
    names = leaf_names(tree)
    if len(set(names)) != len(names):
        raise ValueError("two arrays of a checkpoint have the same name")
    return dict(zip(names, jax.tree.leaves(tree), strict=True))


def description(arrays: dict[str, Any]) -> dict[str, list[Any]]:
    """Shape and dtype of each array, as a manifest has them."""
    return {name: [list(x.shape), str(np.dtype(x.dtype))] for name, x in arrays.items()}


def differences(there: dict[str, list[Any]], here: dict[str, list[Any]]) -> str:
    """Names, shapes and dtypes in which two descriptions differ, the first five of them; empty if they do not."""
    differing = [
        f"{name}: {there.get(name)} there, {here.get(name)} here"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    ]
    more = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
    return "; ".join(differing[:5]) + more


@contextlib.contextmanager
def write_errors(path: pathlib.Path) -> Iterator[None]:
    """Turns what the system and Orbax raise on writing a checkpoint into one line."""
    try:
        yield
    except CheckpointError:
        raise
    except FileError as error:
        raise CheckpointError(f"{path} could not be written: {error}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} could not be written: {explain(error)}") from error


def _ignore_abandoned_tasks() -> None:
    """The first write that fails ends a save; of the errors of Orbax's others nothing is told from here on.

    It would be told when the tasks are collected, which may be at any later time: so this is not undone.
    """
    logging.getLogger("asyncio").addFilter(_is_not_abandoned)
    warnings.filterwarnings("ignore", r"coroutine '.*write_fragment' was never awaited", RuntimeWarning)


def _is_not_abandoned(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not (message.startswith("Task exception was never retrieved") and f"{os.sep}orbax{os.sep}" in message)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within the block Orbax's threads do not print the errors that the main thread gets anyway, traces and all."""
    _ignore_abandoned_tasks()
    logger, hook = logging.getLogger("absl"), sys.unraisablehook

    def is_other(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    def report_other(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":  # of writes that fail after the first that did
            hook(unraisable)

    logger.addFilter(is_other)
    sys.unraisablehook = report_other
    try:
        yield
    finally:
        logger.removeFilter(is_other)
        if sys.unraisablehook is report_other:
            sys.unraisablehook = hook
