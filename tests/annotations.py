"""The shapes and dtypes of rat_jax's annotations, checked at every call.

`jaxtyping`'s import hook hands each function of the package to `checked` (`tests/conftest.py` installs it).
"""

import dataclasses
import functools
import inspect
import operator
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

import beartype
import jax
import jaxtyping
from beartype.door import is_bearable
from beartype.vale import Is


def checked(function: Callable) -> Callable:
    """The function, which refuses arrays of other shapes and dtypes than it names.

    Beside the arrays of a signature these are the fields of the NamedTuples and dataclasses in it, with which they
    share their letters. Nothing else is checked. Constructors are not: JAX makes objects anew with whatever a
    transformation puts in place of arrays, and with the arrays of all layers stacked.
    """
    if function.__name__ == "__init__":
        return function
    hints = {name: _with_fields(hint) for name, hint in function.__annotations__.items() if _has_arrays(hint)}
    if not hints:
        return function
    function.__annotations__ = hints
    return beartype.beartype(function)


def _is_array(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


@functools.cache
def _array_fields(cls: type) -> dict[str, Any]:
    """Annotations of the arrays of a NamedTuple or dataclass of the package."""
    is_record = dataclasses.is_dataclass(cls) or hasattr(cls, "_fields")
    if not is_record or cls.__module__.partition(".")[0] != "rat_jax":
        return {}
    return {name: hint for name, hint in inspect.get_annotations(cls).items() if _has_arrays(hint, records=False)}


def _has_arrays(hint: Any, *, records: bool = True) -> bool:
    if _is_array(hint):
        return True
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias):
        return records and bool(_array_fields(hint))
    return any(_has_arrays(part, records=records) for part in typing.get_args(hint))


def _with_fields(hint: Any) -> Any:
    """The annotation, with conditions on the fields of the classes in it."""
    if _is_array(hint) or not _has_arrays(hint):
        return hint
    parts = tuple(_with_fields(part) for part in typing.get_args(hint))
    if not parts:
        return Annotated[hint, Is[_fields_fit]]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, parts)
    return typing.get_origin(hint)[parts]


def _fields_fit(record: Any) -> bool:
    fields = {name: (getattr(record, name), hint) for name, hint in _array_fields(type(record)).items()}
    if any(isinstance(value, jax.ShapeDtypeStruct) for value, _ in fields.values()):
        return True  # `jax.eval_shape` made it
    return all(is_bearable(value, hint) for value, hint in fields.values())
