"""Errors that a user can mend: the message, which is all that a program prints, says what to change."""

import reprlib


class RatJaxError(Exception):
    """Base of the errors that this package raises for its inputs: configs, files, data, prompts, diverging runs."""


class RunStopped(RatJaxError):
    """What had begun could not go on; the message says what was kept. A program ends with 1, else with 2."""


class ConfigError(RatJaxError, ValueError):
    """A value or a combination of values that no run, model or mixer can have; the message names the field."""


def require(condition: bool, message: str) -> None:
    """Raises a `ConfigError` with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def shown(value: object) -> str:
    """A value for a message: `repr`, cut where it is long or nested deeply, always one line."""
    return _REPR.repr(value)


def _short_repr() -> reprlib.Repr:
    short = reprlib.Repr()
    short.maxlevel = 3
    short.maxlist = short.maxtuple = short.maxdict = short.maxset = 12
    short.maxstring = short.maxother = 100
    return short


_REPR = _short_repr()
