"""Checks the fields of dataclasses against their annotations: Python does not."""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from rat_jax.errors import require


def check_types(instance: Any) -> None:
    """Checks every field of a dataclass.

    Raises:
      ConfigError: naming the field, its type and what it holds.
    """
    for name, hint in _hints(type(instance)).items():
        value = getattr(instance, name)
        require(_fits(hint, value), f"{name} must be {_describe(hint)}, got {value!r}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _fits(hint: Any, value: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(argument, value) for argument in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        return isinstance(value, (tuple, list)) and all(_fits(arguments[0], item) for item in value)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint) and (hint is not int or not isinstance(value, bool))


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(hint)))}"
    names = {int: "a whole number", float: "a finite number", bool: "True or False", str: "text"}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in typing.get_args(hint))
    if hint is types.NoneType:
        return "None"
    return names.get(hint, f"of type {str(hint).removeprefix('typing.')}")
