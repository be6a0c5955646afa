"""Greedy steps of many rows with random weights, through the library's own decoder."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import card, step_profile
from benchmarks.caches import random_contents
from benchmarks.timing import time_steps
from rat_jax.config import ModelConfig
from rat_jax.decoder import Decoder, DecoderLayout, DecoderModule, ModelCache
from rat_jax.layers import INITIAL_STD
from rat_jax.memory import free_bytes, tree_bytes
from rat_jax.model import LanguageModel
from rat_jax.shapes import Array, Int

STEPS_PER_CALL = 16  # that the host asks for at once
_CACHE_SHARE = 0.9  # of free memory; the rest is for a step's activations and what the allocator cannot join
_ROWS_UNIT = 16  # the most rows that fit are a multiple of it, if they are as many

TITLES = f"{'rows':>6} {'ms a step':>10} {'tokens/s':>10} {'bound ms':>9} {'reached':>8} {'cache GB':>9} {'all GB':>7}"


class DecodeRow(NamedTuple):
    """One number of rows at one place."""

    num_rows: int
    ms: float  # a step, mean over the positions
    cache_gb: float  # allocated
    read_gb: float  # that a step must read, in the mean over the positions: cache and weights
    held_gb: float  # weights, cache and what steps allocate for a while

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all rows."""
        return 1e3 * self.num_rows / self.ms

    def bound_ms(self, gb_per_s: float) -> float:
        """A step that only reads what it must."""
        return 1e3 * self.read_gb / gb_per_s

    def line(self, gb_per_s: float) -> str:
        """As `TITLES` says."""
        bound = self.bound_ms(gb_per_s)
        return (
            f"{self.num_rows:>6} {self.ms:>10.2f} {self.tokens_per_s:>10.0f} {bound:>9.2f} {bound / self.ms:>8.1%} "
            f"{self.cache_gb:>9.2f} {self.held_gb:>7.1f}"
        )


def random_decoder(config: ModelConfig) -> Decoder:
    """A decoder of random matrices and of norms and gate biases of 1, made leaf by leaf in the decoder's dtypes."""

    def make() -> DecoderModule:
        return DecoderModule(LanguageModel(config, rngs=nnx.Rngs(0)))

    graphdef, shapes = nnx.split(nnx.eval_shape(make))
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))
    return Decoder(nnx.merge(graphdef, jax.tree.map(lambda x: _random_weights(next(keys), x.shape, x.dtype), shapes)))


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))  # one program for all layers
def _random_weights(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    return INITIAL_STD * jax.random.normal(key, shape, dtype) if len(shape) >= 2 else jnp.ones(shape, dtype)


def free_for_rows() -> int | None:
    """Bytes that the device has free; None where it does not tell, and of a CPU, whose memory others use too."""
    device = jax.devices()[0]
    return None if device.platform == "cpu" else free_bytes(device)


def most_rows(decoder: Decoder, capacity: int) -> int | None:
    """So many rows of `capacity` tokens fit what the device has free; None as of `free_for_rows`."""
    free = free_for_rows()
    if free is None:
        return None
    logits = 2 * 4 * decoder.config.vocab_size  # float32, and once more on their way to the likeliest
    count = int(_CACHE_SHARE * free / (decoder.cache_bytes(_ROWS_UNIT, capacity) / _ROWS_UNIT + logits))
    return count if count < _ROWS_UNIT else count // _ROWS_UNIT * _ROWS_UNIT


def lower(decoder: Decoder, num_rows: int, capacity: int) -> jax.stages.Lowered:
    """STEPS_PER_CALL steps of so many rows, whose caches have room for `capacity` tokens each."""
    shapes = _cache_shapes(decoder, num_rows, capacity)
    return _steps.lower(decoder.layout, decoder.arrays, jnp.zeros((num_rows,), jnp.int32), shapes, jnp.int32(0))


def measure(
    decoder: Decoder, compiled: jax.stages.Compiled, num_rows: int, capacity: int, first: int, last: int, steps: int
) -> DecodeRow:
    """Times `steps` steps, in calls of STEPS_PER_CALL that are spread evenly over the positions first .. last.

    A call is asked for before the one before it has ended, as the engine does: the host's part of it is hidden.

    Args:
      decoder: whose arrays are read.
      compiled: from `lower` with the same decoder, `num_rows` and `capacity`.
      num_rows: that take each step together.
      capacity: of the caches, `last` or more.
      first: tokens that the rows have read before the earliest step.
      last: tokens that they have read after the latest; STEPS_PER_CALL more than `first` at least.
      steps: that are timed; rounded down to whole calls, one at least.
    """
    calls = max(1, steps // STEPS_PER_CALL)
    room = last - STEPS_PER_CALL - first
    starts = [first + room * (2 * i + 1) // (2 * calls) for i in range(calls)]
    shapes = _cache_shapes(decoder, num_rows, capacity)
    left = iter([starts[0], *starts, starts[-1]])  # the first and the last are not counted

    def call(carried):
        tokens, cache = compiled(decoder.arrays, *carried, jnp.int32(next(left)))
        return (tokens, cache), tokens

    carried = jnp.zeros((num_rows,), jnp.int32), random_contents(shapes)
    seconds, _ = time_steps(call, carried, calls, jax.block_until_ready)
    module = decoder.layout.merge(decoder.arrays)
    middle = [start + STEPS_PER_CALL // 2 for start in starts]
    read = tree_bytes(decoder.arrays) + sum(module.step_bytes(shapes, position) for position in middle) / len(middle)
    return DecodeRow(
        num_rows,
        ms=1e3 * sum(seconds) / (calls * STEPS_PER_CALL),
        cache_gb=tree_bytes(shapes) / 1e9,
        read_gb=read / 1e9,
        held_gb=card.held_gb(compiled),
    )


def profile(
    decoder: Decoder, compiled: jax.stages.Compiled, num_rows: int, capacity: int, position: int, folder: str
) -> str:
    """What the device does in one call of `lower`'s program at a position; leaves the trace in the folder."""
    tokens, cache = jnp.zeros((num_rows,), jnp.int32), random_contents(_cache_shapes(decoder, num_rows, capacity))
    tokens, cache = jax.block_until_ready(compiled(decoder.arrays, tokens, cache, jnp.int32(position)))
    return step_profile.report(
        step_profile.trace(compiled, (decoder.arrays, tokens, cache, jnp.int32(position)), folder), top=40
    )


def _cache_shapes(decoder: Decoder, num_rows: int, capacity: int) -> ModelCache:
    return jax.eval_shape(lambda arrays: decoder.layout.merge(arrays).init_cache(num_rows, capacity), decoder.arrays)


@functools.partial(jax.jit, static_argnames="layout", donate_argnames="cache")
def _steps(
    layout: DecoderLayout,
    arrays: list[Array],
    tokens: Int[Array, " B"],
    cache: ModelCache,
    start: Int[Array, ""],
) -> tuple[Int[Array, " B"], ModelCache]:
    """STEPS_PER_CALL greedy steps of rows that have read `start` tokens; the cache is updated in place."""

    def step(_, carry):
        tokens, cache = carry
        decoder = layout.merge(arrays)
        hidden, cache = decoder.hidden(tokens[:, None], cache)
        return jnp.argmax(decoder.logits(hidden)[:, 0], axis=-1).astype(jnp.int32), cache

    return jax.lax.fori_loop(0, STEPS_PER_CALL, step, (tokens, cache.at(start)))
