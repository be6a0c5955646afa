"""Which measurement the flags of a command choose, and which flags it refuses."""

import pytest
from absl import flags

from rat_jax.evaluation import EvaluationError
from rat_jax.evaluation.mode import Mode, chosen_mode


@pytest.fixture
def modes():
    values = flags.FlagValues()
    first, second, of_loss, of_first, of_both, of_special, _of_all = (
        flags.DEFINE_string(name, None, "", flag_values=values)
        for name in ("first", "second", "of_loss", "of_first", "of_both", "of_special", "of_all")
    )
    table = [
        Mode(None, [of_loss], print),
        Mode(first, [of_both, of_special], print, values=lambda value: value == "special", example="special"),
        Mode(first, [of_first, of_both], print),
        Mode(second, [of_both], print),
    ]

    def chosen(*arguments):
        values(["program", *arguments])
        mode = chosen_mode(table)
        return [mode is other for other in table].index(True)  # flags cannot be compared

    return chosen


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        (["--of_all=x"], 0),
        (["--of_loss=x", "--of_all=x"], 0),
        (["--first=x", "--of_first=x", "--of_both=x", "--of_all=x"], 2),
        (["--first=special", "--of_special=x", "--of_both=x"], 1),
        (["--second=x", "--of_both=x"], 3),
        (["--second="], 3),
    ],
    ids=str,
)
def test_flags_choose(modes, arguments, mode):
    assert modes(*arguments) == mode


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--of_first=x"], "--of_first has no effect without --first"),
        (["--of_both=x"], "--of_both has no effect without --first or --second"),
        (["--second=x", "--of_first=x"], "--of_first has no effect without --first"),
        (["--of_special=x"], "--of_special has no effect without --first=special"),
        (["--first=x", "--of_special=x"], "--of_special has no effect with --first=x"),
        (["--first=special", "--of_first=x"], "--of_first has no effect with --first=special"),
        (["--first=special", "--of_loss=x"], "--of_loss has no effect with --first"),
        (["--second=x", "--of_loss=x"], "--of_loss has no effect with --second"),
        (["--first=x", "--second=x"], "--first and --second are different measurements: give one at a time"),
    ],
    ids=str,
)
def test_flags_of_other_modes_are_refused(modes, arguments, message):
    with pytest.raises(EvaluationError, match=f"^{message}$"):
        modes(*arguments)
