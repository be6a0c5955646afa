"""Numbers and values of JSON as text."""

import json
from typing import Any

ABSENT = "–"


def fixed(value: float | None, digits: int = 4) -> str:
    """With so many digits after the point."""
    return ABSENT if value is None else f"{value:,.{digits}f}"


def count(value: int | None) -> str:
    """A whole number with commas."""
    return ABSENT if value is None else f"{value:,}"


def short(value: float | None) -> str:
    """A large number to three digits: 1.1 M."""
    return ABSENT if value is None else _in_units(value, 1000, ("", "k", "M", "B", "T"))


def axis(value: float) -> str:
    """A place on an axis: 50, 2,500, 50 k, 1.25 M."""
    value, unit = _scaled(value, 1000, ("", "k", "M", "B", "T")) if abs(value) >= 10_000 else (value, "")
    return f"{value:,.5g} {unit}".strip()


def num_bytes(value: float | None) -> str:
    """In bytes, KiB, MiB, GiB or TiB, to three digits."""
    return ABSENT if value is None else _in_units(value, 1024, ("bytes", "KiB", "MiB", "GiB", "TiB"))


def percent(share: float | None) -> str:
    """A share of 1."""
    return ABSENT if share is None else f"{100 * share:.3g} %"


def plain(value: Any) -> str:
    """A value of a config or of settings."""
    match value:
        case None:
            return "none"
        case str():
            return value
        case list() | tuple():
            return ", ".join(map(plain, value))
    return json.dumps(value, sort_keys=True)


def _scaled(value: float, base: int, units: tuple[str, ...]) -> tuple[float, str]:
    place = 0
    while abs(value) >= base and place < len(units) - 1:
        value, place = value / base, place + 1
    return value, units[place]


def _in_units(value: float, base: int, units: tuple[str, ...]) -> str:
    scaled, unit = _scaled(value, base, units)
    digits = 0 if scaled == round(scaled) else max(0, 3 - len(str(int(abs(scaled)))))
    return f"{scaled:,.{digits}f} {unit}".strip()
