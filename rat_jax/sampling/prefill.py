"""Reading prompts of different lengths into a cache, a chunk at a time, in few shapes."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rat_jax.decoder import ModelCache
from rat_jax.memory import tree_bytes
from rat_jax.shapes import Array, Float, Int

PREFILL_TOKENS = 1 << 14  # of all rows together, read in one call: what bounds the memory of long prompts
MAX_PREFILL_CHUNK = 1024  # tokens of a row read in one call
MIN_PREFILL_CHUNK = 16


def prefill(
    graphdef: nnx.GraphDef, params: nnx.State, prompts: Sequence[Sequence[int]], capacity: int
) -> tuple[Float[Array, "B D"], ModelCache]:
    """The hidden state of each prompt's last token, and the cache after it; prompts of at least one token.

    Args:
      graphdef: of a `DecoderModule`.
      params: of the decoder.
      prompts: lengths may differ.
      capacity: of the cache, tokens a row.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    hidden, cache = _empty(graphdef, params, len(prompts), capacity)
    start = 0
    for size in prefill_chunks(int(lengths.max()), len(prompts)):
        tokens = np.zeros((len(prompts), size), np.int32)
        for row, prompt in enumerate(prompts):
            part = prompt[start : start + size]
            tokens[row, : len(part)] = part
        hidden, cache = _read_chunk(graphdef, params, tokens, lengths - start, hidden, cache)
        start += size
    return hidden, cache


def prefill_chunks(num_tokens: int, num_rows: int) -> list[int]:
    """Tokens of a row in each call that reads prompts: full chunks, then a power of two. Few shapes, few compilations.

    Args:
      num_tokens: of the longest prompt.
      num_rows: prompts; the more there are, the shorter the chunks.
    """
    limit = max(MIN_PREFILL_CHUNK, min(MAX_PREFILL_CHUNK, PREFILL_TOKENS // num_rows))
    chunk = 1 << (limit.bit_length() - 1)
    rest = num_tokens % chunk
    last = [] if rest == 0 else [max(MIN_PREFILL_CHUNK, 1 << (rest - 1).bit_length())]
    return [chunk] * (num_tokens // chunk) + last


def cache_capacity(num_tokens: int) -> int:
    """Room for `num_tokens`, in few sizes: a multiple of an eighth of the next power of two."""
    unit = max(MIN_PREFILL_CHUNK, (1 << (num_tokens - 1).bit_length()) // 8)
    return -(-num_tokens // unit) * unit


def cache_bytes(graphdef: nnx.GraphDef, params: nnx.State, num_rows: int, capacity: int) -> int:
    """What a cache takes, without making it; the arguments are those of `prefill`."""
    shapes = jax.eval_shape(functools.partial(_empty, graphdef, num_rows=num_rows, capacity=capacity), params)
    return tree_bytes(shapes)


@functools.partial(jax.jit, static_argnames=("graphdef", "num_rows", "capacity"))
def _empty(graphdef: nnx.GraphDef, params: nnx.State, num_rows: int, capacity: int) -> tuple[Array, ModelCache]:
    decoder = nnx.merge(graphdef, params)
    hidden = jnp.zeros((num_rows, decoder.config.width), decoder.config.dtype)
    return hidden, decoder.init_cache(num_rows, capacity)


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames=("hidden", "cache"))
def _read_chunk(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens: Int[Array, "B T"],
    num_left: Int[Array, " B"],
    hidden: Float[Array, "B D"],
    cache: ModelCache,
) -> tuple[Float[Array, "B D"], ModelCache]:
    """Reads one chunk of prompts of which `num_left` tokens were left; `hidden` changes where a prompt ends in it."""
    indices = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    is_token = (indices < num_left[:, None]).astype(jnp.int32)
    new, cache = nnx.merge(graphdef, params).hidden(tokens, cache, is_token)
    last = num_left - 1
    ends_here = (last >= 0) & (last < tokens.shape[1])
    at_last = jnp.take_along_axis(new, jnp.clip(last, 0, tokens.shape[1] - 1)[:, None, None], axis=1)[:, 0]
    return jnp.where(ends_here[:, None], at_last, hidden), cache
