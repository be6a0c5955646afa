"""Decode throughput of a config: greedy steps of many rows, through the library's own decoder."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.caches import random_contents
from benchmarks.timing import time_once
from rat_jax.config import ModelConfig
from rat_jax.decoder import DecoderModule, ModelCache
from rat_jax.layers import INITIAL_STD
from rat_jax.model import LanguageModel
from rat_jax.shapes import Array, Int

STEPS_PER_CALL = 16  # as many as `rat_jax.sampling.slots` takes before the host looks at them


class DecodeRow(NamedTuple):
    """One batch size."""

    ms: float  # a step, mean over the positions
    cache_gb: float  # allocated
    read_gb: float  # that a step must read, in the mean over the positions: cache and weights


def random_decoder(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """A decoder of random matrices and of norms and gate biases of 1, made leaf by leaf in the decoder's dtypes."""

    def make() -> DecoderModule:
        return DecoderModule(LanguageModel(config, rngs=nnx.Rngs(0)))

    graphdef, shapes = nnx.split(nnx.eval_shape(make))
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))
    return graphdef, jax.tree.map(lambda x: _random_weights(next(keys), x.shape, x.dtype), shapes)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))  # one program for all layers
def _random_weights(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    return INITIAL_STD * jax.random.normal(key, shape, dtype) if len(shape) >= 2 else jnp.ones(shape, dtype)


def measure(graphdef: nnx.GraphDef, params: nnx.State, batch_size: int, first: int, last: int, steps: int) -> DecodeRow:
    """Times `steps` steps, in calls of STEPS_PER_CALL that are spread evenly over the positions first .. last."""
    calls = max(1, steps // STEPS_PER_CALL)
    room = last - STEPS_PER_CALL - first
    starts = [first + room * (2 * i + 1) // (2 * calls) for i in range(calls)]

    def new_cache() -> ModelCache:
        return nnx.merge(graphdef, params).init_cache(batch_size, last)

    shapes = jax.eval_shape(new_cache)
    tokens = jnp.zeros((batch_size,), jnp.int32)
    start = jnp.int32(first)
    compiled = _steps.lower(graphdef, params, tokens, shapes, start).compile()
    cache = random_contents(shapes)
    seconds = []
    for start in [starts[0], *starts]:
        took, (tokens, cache) = time_once(compiled, (params, tokens, cache, jnp.int32(start)), jax.block_until_ready)
        seconds.append(took)
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    decoder = nnx.merge(graphdef, params)
    middle = [start + STEPS_PER_CALL // 2 for start in starts]
    read = weights + sum(decoder.step_bytes(shapes, position) for position in middle) / len(middle)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    return DecodeRow(1e3 * sum(seconds[1:]) / (calls * STEPS_PER_CALL), held / 1e9, read / 1e9)


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames=("tokens", "cache"))
def _steps(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens: Int[Array, " B"],
    cache: ModelCache,
    start: Int[Array, ""],
) -> tuple[Int[Array, " B"], ModelCache]:
    """STEPS_PER_CALL greedy steps of rows that have read `start` tokens; the cache is updated in place."""

    def step(_, carry):
        tokens, cache = carry
        decoder = nnx.merge(graphdef, params)
        hidden, cache = decoder.hidden(tokens[:, None], cache)
        return jnp.argmax(decoder.logits(hidden)[:, 0], axis=-1).astype(jnp.int32), cache

    return jax.lax.fori_loop(0, STEPS_PER_CALL, step, (tokens, nnx.merge(graphdef, params).cache_at(cache, start)))
