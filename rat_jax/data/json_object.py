"""JSON objects that files hold, read as dataclasses: names, types and numbers are checked, errors name the file."""

import dataclasses
import hashlib
import json
import pathlib
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from rat_jax.data import DataError
from rat_jax.files import explain

T = TypeVar("T")


def read_bytes(path: pathlib.Path) -> bytes:
    """The content of a file.

    Raises:
      DataError: if the system refuses it.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {explain(error)}") from None


def parse_object(content: bytes, name: str) -> dict[str, Any]:
    """The JSON object of a UTF-8 text.

    Args:
      content: the text.
      name: of what holds it, for the message: "the header of train.bin".

    Raises:
      DataError: if it is anything else.
    """
    try:
        values = json.loads(content.decode())
    except RecursionError:
        raise DataError(f"{name} is damaged: brackets are nested too deep") from None
    except ValueError as error:  # no UTF-8, no JSON, a number of too many digits
        raise DataError(f"{name} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{name} is damaged: expected a JSON object, got {_shown(values)}")
    return values


def build(cls: type[T], values: Any, name: str) -> T:
    """A dataclass from the object that holds its fields.

    Raises:
      DataError: if a field is missing or unknown, or of another type than it is declared with; numbers must be finite.
    """
    if not isinstance(values, dict):
        raise DataError(f"{name} is damaged: expected a JSON object, got {_shown(values)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    required = [field for field in fields.values() if field.default is dataclasses.MISSING]
    if missing := [field.name for field in required if field.name not in values]:
        raise DataError(f"{name} is damaged: it has no {missing[0]}")
    if unknown := sorted(set(values) - set(fields)):
        raise DataError(f"{name} is damaged: unknown field {unknown[0][:80]!r}")
    hints = typing.get_type_hints(cls)
    for field, value in values.items():
        if not _fits(value, hints[field]):
            raise DataError(f"{name} is damaged: {field} is {_shown(value)}, expected {_described(hints[field])}")
    return cls(**values)


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


def _fits(value: Any, hint: Any) -> bool:
    match typing.get_origin(hint):
        case typing.Union | types.UnionType:
            return any(_fits(value, part) for part in typing.get_args(hint))
        case origin if origin is not None:
            return isinstance(value, origin)
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # which no NaN is, and no huge int
    return type(value) is hint  # a bool is no int


def _described(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)


def _shown(value: Any) -> str:
    return repr(value)[:80] if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"
