"""What eval.py can measure, and the flags that belong to each measurement."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from absl.flags import FlagHolder

from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.subject import Subject


@dataclasses.dataclass(frozen=True)
class Mode:
    """One measurement. Flags that no mode names belong to all of them."""

    flag: FlagHolder | None  # what chooses it; None: the mode of a command without any such flag
    flags: Sequence[FlagHolder]  # of the others, those with an effect; one may belong to several modes
    run: Callable[[Subject], None]
    several_lengths: bool = False  # whether it measures several context lengths in one go
    values: Callable[[Any], bool] = lambda value: True  # of its flag, those that choose it
    example: str | None = None  # of such a value


def chosen_mode(modes: Sequence[Mode]) -> Mode:
    """The mode that the flags of the command choose: of those with one flag, the first that takes its value.

    Args:
      modes: one of them without a flag.

    Raises:
      EvaluationError: if flags of two are given, or a flag that has no effect on the chosen one.
    """
    given: dict[str, Mode] = {}
    for mode in modes:
        if mode.flag is not None and mode.flag.present and mode.values(mode.flag.value):
            given.setdefault(mode.flag.name, mode)
    if len(given) > 1:
        raise EvaluationError(
            f"{' and '.join(f'--{name}' for name in given)} are different measurements: give one at a time"
        )
    (chosen,) = given.values() or [mode for mode in modes if mode.flag is None]
    has_effect = {flag.name for flag in chosen.flags}
    for flag in [flag for mode in modes for flag in mode.flags]:
        if flag.present and flag.name not in has_effect:
            raise EvaluationError(f"--{flag.name} has no effect {_without_effect(flag, modes, chosen)}")
    return chosen


def _without_effect(flag: FlagHolder, modes: Sequence[Mode], chosen: Mode) -> str:
    """Which flag is too many, or lacking."""
    owners = [mode for mode in modes if flag.name in {own.name for own in mode.flags}]
    names = {None if mode.flag is None else mode.flag.name for mode in owners}
    if chosen.flag is not None and None in names:
        return f"with --{chosen.flag.name}"
    if chosen.flag is not None and chosen.flag.name in names:  # for other values of it
        value = chosen.flag.value
        return f"with --{chosen.flag.name}={','.join(value) if isinstance(value, list) else value}"
    examples = {mode.flag.name: mode.example for mode in owners}  # the last mode of a flag takes any value
    shown = [f"--{name}" if example is None else f"--{name}={example}" for name, example in examples.items()]
    return f"without {' or '.join(shown)}"
