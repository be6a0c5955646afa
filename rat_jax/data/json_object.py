"""JSON objects that files hold, read as dataclasses: names, types and numbers are checked, errors name the file."""

import dataclasses
import hashlib
import json
import pathlib
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from rat_jax import files
from rat_jax.data import DataError
from rat_jax.errors import shown
from rat_jax.fields import describe, fits

T = TypeVar("T")
LARGEST = 2**53  # of figures in files: what is beyond it was neither counted nor measured, but is damage


def read_bytes(path: pathlib.Path) -> bytes:
    """The content of a file.

    Raises:
      DataError: if the system refuses it.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {files.explain(error)}") from None


def parse_object(content: bytes, name: str) -> dict[str, Any]:
    """`rat_jax.files.parse_object` of data: what is wrong is a `DataError`."""
    try:
        return files.parse_object(content, name)
    except files.ContentError as error:
        raise DataError(str(error)) from None


def build(cls: type[T], values: Any, name: str) -> T:
    """A dataclass from the object that holds its fields.

    Raises:
      DataError: if a field is missing or unknown, or of another type than it is declared with; numbers must be finite.
    """
    if not isinstance(values, dict):
        raise DataError(f"{name} is damaged: expected a JSON object, got {shown(values)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    required = [field for field in fields.values() if field.default is dataclasses.MISSING]
    if missing := [field.name for field in required if field.name not in values]:
        raise DataError(f"{name} is damaged: it has no {missing[0]}")
    if unknown := sorted(set(values) - set(fields)):
        raise DataError(f"{name} is damaged: unknown field {unknown[0][:80]!r}")
    hints = typing.get_type_hints(cls)
    for field, value in values.items():
        if not fits(hints[field], value):
            raise DataError(f"{name} is damaged: {field} must be {describe(hints[field])}, got {shown(value)}")
    return cls(**values)


def build_known(cls: type[T], values: Any, name: str) -> T:
    """`build` of the fields that a class has; `values` may hold more."""
    fields = [field.name for field in dataclasses.fields(cls)]
    if isinstance(values, dict):
        values = {key: value for key, value in values.items() if key in fields}
    return build(cls, values, name)


def require(condition: bool, name: str, message: str) -> None:
    """Raises a `DataError` that says that `name` is damaged unless the condition holds."""
    if not condition:
        raise DataError(f"{name} is damaged: {message}")


def checksum(values: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, of what an object says: neither the order of its keys nor white space counts."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def is_digest(text: str) -> bool:
    """Whether a text is a SHA-256 in hexadecimal as this package writes it."""
    return len(text) == 64 and not set(text) - set("0123456789abcdef")
