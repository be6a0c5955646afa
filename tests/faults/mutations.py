"""Damage to bytes and to JSON, drawn from a seed: what disks, editors, merges and interrupted copies do to files."""

import json
import random
from typing import Any

# What a hand, a script or another program writes where a value was.
ODD_VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**63,
    1e400,
    -1e400,
    0.5,
    "",
    "0",
    "null",
    "\0",
    "é",
    [],
    {},
    [[]],
    {"": {}},
]


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Another content: a flipped bit, a changed, lost or doubled piece, zeros, an early end, something appended."""
    while True:
        damaged = _damage(bytearray(content), rng)
        if damaged != content:
            return damaged


def _damage(content: bytearray, rng: random.Random) -> bytes:
    if not content:
        return rng.randbytes(rng.randint(1, 64))
    at = rng.randrange(len(content))
    length = min(rng.choice([1, 1, 2, 4, 16, 64, 4096]), len(content) - at)
    match rng.randrange(9):
        case 0 | 1:
            content[at] ^= 1 << rng.randrange(8)
        case 2:
            content[at : at + length] = rng.randbytes(length)
        case 3:
            del content[at : at + length]
        case 4:
            content[at:at] = content[at : at + length]
        case 5:
            content[at:at] = rng.randbytes(length)
        case 6:
            content[at : at + length] = bytes(length)
        case 7:
            del content[at:]
        case 8:
            content += rng.choice([b"\n", b"\0" * 512, rng.randbytes(7), bytes(content[:at])])
    return bytes(content)


def mutate_json(values: Any, rng: random.Random) -> Any:
    """A copy of JSON values with one of them changed, lost, added or renamed."""
    values = json.loads(json.dumps(values))
    container, key = rng.choice(list(_places(values)))
    old = container[key]
    match rng.randrange(6):
        case 0 if isinstance(container, dict):
            del container[key]
        case 1 if isinstance(container, dict):
            container[f"{key}{rng.choice(['', ' ', '_', 's', 'x'])}"] = container.pop(key)
            container.setdefault(rng.choice(["new", "", "format_version"]), rng.choice(ODD_VALUES))
        case 2 if isinstance(old, bool | int | float):
            container[key] = rng.choice([old + 1, old - 1, -old, old * 2, float(old), str(old), [old]])
        case 3 if isinstance(old, str):
            container[key] = rng.choice([old[:-1], old + "0", old.upper(), "../" + old, "/" + old, old * 100])
        case _:
            container[key] = rng.choice(ODD_VALUES)
    return values


def _places(values: Any):
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield values, key
        yield from _places(value)


def mutate_json_text(content: bytes, rng: random.Random) -> bytes:
    """A JSON file with another value in it, or with damaged bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(content, rng)
    while True:
        damaged = json.dumps(mutate_json(json.loads(content), rng)).encode()
        if damaged != content:
            return damaged
