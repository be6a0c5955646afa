"""Eight devices, whatever a mesh cuts, have the loss and the gradients that one has."""

import functools

import pytest

from rat_jax.mixers import MIXERS
from tests import virtual_devices
from tests.exchanged_bytes import CHUNK, ROWS, TOKENS, WIDTH

ALONE = ["8x1x1x1", "1x8x1x1", "1x1x8x1", "1x1x1x8"]  # data, fsdp, context, tensor
OF_TWO = ["2x4x1x1", "2x1x4x1", "4x1x1x2", "1x2x4x1", "1x4x1x2", "1x1x4x2"]
LIMIT = 1e-5


@functools.cache
def errors(mixers, kind, *meshes):
    """Of a model of each mixer: of the loss, and of the gradient that is furthest off; relative."""
    return virtual_devices.run("tests.sharded_gradients", ",".join(mixers), kind, *meshes, count=8)


@pytest.mark.parametrize("mixer", MIXERS)
def test_all_axes_together(mixer):
    """Tokens of packed documents in two parts, heads in two, rows and parameters in two."""
    found = errors(tuple(MIXERS), "packed", "1x2x2x2")[mixer]["1x2x2x2"]
    assert max(found["loss"], found["gradient"]) < LIMIT, found


def test_single_tokens_of_cut_heads():
    """Which are projected by other products than many; RAT's kernels and plain XLA cut them as whole chunks alone."""
    found = virtual_devices.run("tests.sharded_single_tokens", count=2)
    assert max(found.values()) < LIMIT, found


def test_rat_exchanges_summaries_where_attention_exchanges_keys():
    """In the compiled programs; RAT's also say of which documents the summaries are."""
    found = virtual_devices.run("tests.exchanged_bytes", count=8)
    whole = 2 * 4 * ROWS * TOKENS * WIDTH  # keys and values, float32
    assert whole <= found["attention"]["all-gather"] < 1.02 * whole
    assert whole / CHUNK <= found["rat"]["all-gather"] < 1.02 * whole / CHUNK
    assert found["rat"].keys() <= {"all-gather", "collective-permute"}
    states = 4 * 2 * 4 * ROWS * WIDTH  # four rounds of decays and running sums, float32
    assert found["rat"]["collective-permute"] <= 2 * states  # keys and values
    assert found["rnn"].keys() == {"collective-permute"}
    assert found["rnn"]["collective-permute"] <= states


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [*ALONE, *OF_TWO])
@pytest.mark.parametrize("kind", ["packed", "whole"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_axis_and_every_two(mixer, kind, mesh):
    found = errors((mixer,), kind, *ALONE, *OF_TWO)[mixer][mesh]
    assert max(found["loss"], found["gradient"]) < LIMIT, found
