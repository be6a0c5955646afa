"""Damage to files, drawn at random."""

import copy
import random
from typing import Any

# What a field may be instead.
_VALUES = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    0.5,
    1e300,
    float("nan"),
    "",
    "x",
    "\ud800",
    "a\0b",
    [],
    {},
    [[]],
)


def damaged(content: bytes, generator: random.Random) -> bytes:
    """Other bytes: bits flipped, a part zeroed, taken out, doubled or exchanged, the end cut off."""
    while True:
        changed = bytearray(content)
        first, second = sorted(generator.randrange(len(content)) for _ in range(2))
        second = min(second, first + generator.choice([1, 8, 100, len(content)]))
        match generator.randrange(6):
            case 0:
                for _ in range(generator.choice([1, 1, 3])):
                    changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            case 1:
                changed[first:second] = bytes(second - first)
            case 2:
                del changed[first:second]
            case 3:
                changed[first:first] = changed[first:second]
            case 4:
                changed[first:second] = reversed(changed[first:second])
            case 5:
                del changed[first:]
        if changed != content:
            return bytes(changed)


def damaged_values(values: Any, generator: random.Random) -> Any:
    """Another JSON value: somewhere inside, a field is gone, new or of another value."""
    while True:
        changed = copy.deepcopy(values)
        places = _places(changed)
        container, key = generator.choice(places)
        match generator.randrange(4):
            case 0 if isinstance(container, dict):
                del container[key]
            case 1 if isinstance(container, dict):
                container[generator.choice(["", "x", "format_version", "\ud800"])] = generator.choice(_VALUES)
            case 2:
                other, its_key = generator.choice(places)
                container[key] = copy.deepcopy(other[its_key])
            case _:
                container[key] = copy.deepcopy(generator.choice(_VALUES))
        if repr(changed) != repr(values):
            return changed


def _places(values: Any) -> list[tuple[Any, Any]]:
    """Every place inside, as its container and its key there."""
    found = []
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        found += [(values, key), *_places(value)]
    return found
