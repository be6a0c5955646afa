"""Where the time of a program goes, in one line."""

import re

import jax
import jax.numpy as jnp

from rat_jax.stopwatch import Stopwatch


def test_laps_tokens_and_programs(capsys):
    times = Stopwatch()
    times.lap("load")
    times.add_tokens(0)
    jax.jit(lambda x: x + 1)(jnp.int32(1))
    for _ in range(3):
        times.add_tokens(20)
    times.report()
    jax.jit(lambda x: x + 2)(jnp.int32(1))
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"times: imports [\d.]+ s, load [\d.]+ s, first token [\d.]+ s, 60 tokens in [\d.]+ s \([\d,]+ a second\); "
        r"compiling took [\d.]+ s, some of it side by side \([12] programs\)\n",
        said,
    )
    again = Stopwatch()
    again.lap("evaluation")
    again.report()
    assert re.fullmatch(
        r"times: imports .*, evaluation [\d.]+ s; compiling took 0.00 s, some of it side by side \(0 programs\)\n",
        capsys.readouterr().err,
    )
