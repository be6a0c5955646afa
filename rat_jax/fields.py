"""Values against the annotations of the fields that hold them: Python does not look."""

import dataclasses
import functools
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from rat_jax.errors import require, shown


def check_types(instance: Any) -> None:
    """Checks every field of a dataclass.

    Raises:
      ConfigError: naming the field, its type and what it holds.
    """
    for name, hint in _hints(type(instance)).items():
        value = getattr(instance, name)
        require(fits(hint, value), f"{name} must be {describe(hint)}, got {shown(value)}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def fits(hint: Any, value: Any) -> bool:
    """Whether a value is of the type that an annotation names: a bool is no number, and numbers are finite."""
    if hint is Any:
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(argument, value) for argument in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        return isinstance(value, (tuple, list)) and all(fits(arguments[0], item) for item in value)
    if origin is list:
        return isinstance(value, list) and all(fits(arguments[0], item) for item in value)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, hint) and (hint is not int or not isinstance(value, bool))


def describe(hint: Any) -> str:
    """An annotation in words, for "must be ..., got ..."."""
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(hint)))}"
    names = {int: "a whole number", float: "a finite number", bool: "True or False", str: "text"}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(describe(argument) for argument in typing.get_args(hint))
    if hint is types.NoneType:
        return "None"
    return names.get(hint, f"of type {str(hint).replace('typing.', '')}")
