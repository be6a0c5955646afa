"""Paths as users write them: one meaning for every flag, argument and config field that names a file or folder."""

import os
import pathlib
import re

from rat_jax.errors import RatJaxError

_FILE_SOURCES = ("text", "jsonl", "parquet", "release-bin")  # those whose names go on with a path
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class PathError(RatJaxError, ValueError):
    """A path that names nothing this code can open; the message names the flag or field and what to write instead."""


def local_path(text: str | os.PathLike[str], name: str) -> pathlib.Path:
    """An absolute path: `~` is the home folder, and a relative path starts where the command was given.

    Symbolic links and `..` stay as they are written.

    Args:
      text: as the user wrote it.
      name: of the flag or field, for the message.

    Raises:
      PathError: if it is empty, holds a NUL, names an unknown user's home, or is a URL.
    """
    text = os.fspath(text)
    if not text or "\0" in text:
        raise PathError(f"{name} must be a path, got {text!r}")
    if scheme := _SCHEME.match(text):
        raise PathError(
            f"{name} is {text!r}: {scheme[0]} is not read directly: mount it (gcsfuse, s3fs, rclone) and give "
            f"the path of the mount"
        )
    try:
        return pathlib.Path(os.path.abspath(pathlib.Path(text).expanduser()))
    except RuntimeError:
        raise PathError(f"{name} is {text!r}: there is no such user's home folder") from None


def absolute_source(spec: str, name: str = "a source") -> str:
    """The same source of text by an absolute path, so that it means the same wherever a command is given.

    Args:
      spec: as a `--source` of `rat_jax.data.prepare`.
      name: of the flag or field, for the message.

    Raises:
      PathError: if its path is no path of this machine.
    """
    kind, path = split_source(spec)
    if kind in _FILE_SOURCES:
        return f"{kind}:{local_path(path, kind)}" if path else spec
    return spec if kind else str(local_path(spec, name))


def split_source(spec: str) -> tuple[str, str]:
    """The kind of a source and what stands after its colon; the kind is empty where a path alone is given."""
    kind, colon, name = spec.partition(":")
    if spec == "python-stdlib":
        return spec, ""
    if colon and kind in (*_FILE_SOURCES, "hf", "recall") and not name.startswith("//"):  # hf://... is no path
        return kind, name
    return "", spec
