"""Errors that a user can mend: the message, which is all that a program prints, says what to change."""

import reprlib


class RatJaxError(Exception):
    """Base of the errors that this package raises for its inputs: configs, files, data, prompts, diverging runs."""


class RunStopped(RatJaxError):
    """What had begun could not go on; the message says what was kept. A program ends with 1, else with 2."""


class ProcessLost(RatJaxError):
    """Another process of the job is lost, or did not come; a program ends with 76."""


class ConfigError(RatJaxError, ValueError):
    """A value or a combination of values that no run, model or mixer can have; the message names the field."""


def require(condition: bool, message: str) -> None:
    """Raises a `ConfigError` with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def shown(value: object) -> str:
    """A value for a message: `repr`, cut where it is long or nested deeply, always one line."""
    return _REPR.repr(value)


class _ShortRepr(reprlib.Repr):
    def __init__(self):
        super().__init__()
        self.maxlevel = 3
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 12
        self.maxstring = self.maxother = self.maxlong = 100

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write very long numbers.
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"a number of {x.bit_length():,} bits"


_REPR = _ShortRepr()
