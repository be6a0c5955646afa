"""What eval.py can measure, and the flags that belong to each measurement."""

import dataclasses
from collections.abc import Callable, Sequence

from absl.flags import FlagHolder

from rat_jax.evaluation.perplexity import EvaluationError
from rat_jax.evaluation.subject import Subject


@dataclasses.dataclass(frozen=True)
class Mode:
    """One measurement. Flags that no mode names belong to all of them."""

    flag: FlagHolder | None  # what chooses it; None: the mode of a command without any such flag
    flags: Sequence[FlagHolder]  # of the others, those with an effect; one may belong to several modes
    run: Callable[[Subject], None]
    several_lengths: bool = False  # whether it measures several context lengths in one go


def chosen_mode(modes: Sequence[Mode]) -> Mode:
    """The mode that the flags of the command choose.

    Args:
      modes: one of them without a flag.

    Raises:
      EvaluationError: if two are chosen, or a flag is given that has no effect on the chosen one.
    """
    given = [mode for mode in modes if mode.flag is not None and mode.flag.present]
    if len(given) > 1:
        raise EvaluationError(
            f"{' and '.join(f'--{mode.flag.name}' for mode in given)} are different measurements: give one at a time"
        )
    (chosen,) = given or [mode for mode in modes if mode.flag is None]
    has_effect = {flag.name for flag in chosen.flags}
    for flag in [flag for mode in modes for flag in mode.flags]:
        if not flag.present or flag.name in has_effect:
            continue
        owners = [mode.flag for mode in modes if flag.name in {own.name for own in mode.flags}]
        if any(owner is None for owner in owners):
            raise EvaluationError(f"--{flag.name} has no effect with --{chosen.flag.name}")
        raise EvaluationError(
            f"--{flag.name} has no effect without {' or '.join(f'--{owner.name}' for owner in owners)}"
        )
    return chosen
