"""Reading prompts into a cache of their own, a chunk at a time, in few shapes."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rat_jax.decoder import DecoderLayout, ModelCache
from rat_jax.mesh import constrain_rows
from rat_jax.shapes import Array, Bool, Float, Int

CHUNK_SIZES = (16, 64, 256, 1024)  # tokens of a row read in one call; the largest bounds the memory that a call takes
_PROGRAM_COST = 1.05  # times the tokens are read rather than one more size compiled
_CALL_COST = 16  # tokens a row that could be read in the time by which a call is slower than a part of another


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptRows:
    """Rows that are reading prompts; they are others than those of the slots they go to, and fewer."""

    cache: ModelCache
    hidden: Float[Array, "_ D"]  # of the last token of each prompt that has been read to its end
    seen: Bool[Array, "_ V"] | None  # tokens read; None without a repetition penalty


@functools.partial(jax.jit, static_argnames=("layout", "num_rows", "capacity", "with_seen"))
def empty_prompts(
    layout: DecoderLayout, arrays: list[Array], *, num_rows: int, capacity: int, with_seen: bool
) -> PromptRows:
    """Rows before their first token."""
    decoder = layout.merge(arrays)
    hidden = jnp.zeros((num_rows, decoder.config.width), decoder.config.dtype)
    seen = jnp.zeros((num_rows, decoder.config.vocab_size), bool) if with_seen else None
    return constrain_rows(PromptRows(decoder.init_cache(num_rows, capacity), hidden, seen))


@functools.partial(jax.jit, static_argnames="layout", donate_argnames="rows")
def read_chunk(
    layout: DecoderLayout, arrays: list[Array], rows: PromptRows, tokens: Int[Array, "B T"], num_left: Int[Array, " B"]
) -> PromptRows:
    """Reads the next T tokens of prompts of which `num_left` tokens are left, and may be none; others are padding."""
    rows, tokens = constrain_rows(rows), constrain_rows(tokens)
    indices = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    is_token = indices < num_left[:, None]
    new, cache = layout.merge(arrays).hidden(tokens, rows.cache, is_token.astype(jnp.int32))
    last = num_left - 1
    ends_here = (last >= 0) & (last < tokens.shape[1])
    at_last = jnp.take_along_axis(new, jnp.clip(last, 0, tokens.shape[1] - 1)[:, None, None], axis=1)[:, 0]
    hidden = jnp.where(ends_here[:, None], at_last, rows.hidden)
    seen = rows.seen
    if seen is not None:
        places = jnp.where(is_token, tokens, seen.shape[1])
        seen = seen.at[jnp.arange(tokens.shape[0])[:, None], places].set(True, mode="drop")
    return constrain_rows(PromptRows(cache, hidden, seen))


def chunk_of(prompts: Sequence[np.ndarray], start: int, size: int, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `start`, ... of prompts, padded to [B, T], and how many were left there of each; rows may be spare."""
    tokens = np.zeros((num_rows, size), np.int32)
    num_left = np.zeros((num_rows,), np.int32)
    for row, prompt in enumerate(prompts):
        part = prompt[start : start + size]
        tokens[row, : len(part)] = part
        num_left[row] = len(prompt) - start
    return tokens, num_left


@functools.lru_cache(maxsize=4096)
def plan_chunks(num_tokens: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of the chunks that hold `num_tokens`, the largest first: little padding in few calls.

    Args:
      num_tokens: of the longest prompt that is read.
      sizes: that chunks may have, ascending.
    """
    *smaller, size = sizes
    count, rest = divmod(num_tokens, size)
    whole = (size,) * count
    if rest == 0:
        return whole
    rounded = (*whole, size)
    if not smaller:
        return rounded
    exact = whole + plan_chunks(rest, tuple(smaller))
    return min(exact, rounded, key=lambda plan: sum(plan) + _CALL_COST * len(plan))


def sizes_for(lengths: Sequence[int], sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes, ascending, for prompts of these lengths: without small ones that save little padding."""
    sizes = sizes_up_to(max(lengths), sizes)

    def num_read(sizes: tuple[int, ...]) -> int:
        return sum(sum(plan_chunks(length, sizes)) for length in lengths)

    most = _PROGRAM_COST * num_read(sizes)
    while len(sizes) > 1 and num_read(sizes[1:]) <= most:
        sizes = sizes[1:]
    return sizes


def sizes_up_to(num_tokens: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes, ascending, that prompts of up to `num_tokens` have use for: up to the first that holds them whole."""
    return tuple(size for index, size in enumerate(sizes) if index == 0 or sizes[index - 1] < num_tokens)
