"""What the programs share: flags, errors as one line, exit codes.

0   done
1   what had begun could not go on (`RunStopped`), or the system refused a file on the way
2   flags, config, data or files do not fit, and nothing was changed
75  a signal ended it, and nothing is lost: the same command resumes (EX_TEMPFAIL of sysexits.h, for schedulers)
76  another process of the job is lost, stuck or did not come (`rat_jax.cluster`): the same command resumes
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Literal, NoReturn

from absl import app, flags, logging

from rat_jax.errors import ProcessLost, RatJaxError, RunStopped
from rat_jax.files import explain
from rat_jax.interrupts import INTERRUPTED, NOTHING_LOST, caught, of_program

FAILED, REFUSED, LOST = 1, 2, 76


class FlagError(RatJaxError, ValueError):
    """A command line that cannot be understood; the message names the flag."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse for `exit_code`: what it cannot read is a `FlagError` instead of a usage text of many lines."""

    def error(self, message: str) -> NoReturn:
        raise FlagError(f"{message}; {self.prog} --help lists the flags")


def run(
    body: Callable[[], int | None],
    *,
    required: Sequence[str] = (),
    interrupts: Literal["exit", "raise"] = "exit",
    at_end: Callable[[int], None] = lambda code: None,
) -> None:
    """Reads the flags of absl, runs a program and ends the process.

    Args:
      body: the program; returns its exit code, None for 0.
      required: flags that must be given. They are checked after `--help`.
      interrupts: what signals do at first, see `rat_jax.interrupts`.
      at_end: called with the exit code when the body has ended, however it did.
    """
    logging.set_verbosity(logging.WARNING)  # Orbax reports each step of a restore
    app.define_help_flags()
    with of_program(interrupts):
        code = FAILED
        try:
            code = exit_code(lambda: _parse_and_run(body, required))
        finally:
            at_end(code)
    sys.exit(code)


def exit_code(body: Callable[[], int | None]) -> int:
    """The exit code of a program; whatever a user can mend is printed as one line, `error: ...`."""
    try:
        with caught():
            return body() or 0
    except RunStopped as error:
        return _failed(error, FAILED)
    except ProcessLost as error:
        return _failed(error, LOST)
    except RatJaxError as error:
        return _failed(error, REFUSED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be printed goes nowhere
        return _failed("what read the output has ended", FAILED)
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        return _failed(f"{where}{explain(error)}", FAILED)
    except KeyboardInterrupt:
        print(NOTHING_LOST, file=sys.stderr)
        return INTERRUPTED


def run_command(parser: ArgumentParser, arguments: Sequence[str] | None) -> int:
    """The exit code of a program of commands, each of which has set its function as the default `run`.

    Args:
      parser: its functions take what was parsed.
      arguments: of the command line; None: those of the process.
    """

    def body() -> None:
        parsed = parser.parse_args(arguments)
        parsed.run(parsed)

    return exit_code(body)


def _failed(error: Exception | str, code: int) -> int:
    line = "; ".join(part.strip() for part in str(error).splitlines() if part.strip())
    print(f"error: {line}", file=sys.stderr, flush=True)
    return code


def _parse_and_run(body: Callable[[], int | None], required: Sequence[str]) -> int | None:
    try:
        rest = flags.FLAGS(sys.argv)
    except flags.Error as error:
        raise FlagError(str(error)) from None
    except SystemExit:  # absl ends with 1 after it has printed what --help asks for
        return 0
    if len(rest) > 1:
        raise FlagError(f"{rest[1]!r} is no flag; put a value with spaces in quotes")
    for name in required:
        if flags.FLAGS[name].value is None:
            raise FlagError(f"--{name} is missing; {rest[0]} --help lists the flags")
    return body()
