"""Where Triton kernels find the chunks of packed documents: the tokens of a row as runs, one after the other.

A run is a chunk, or padding up to the next chunk or the next multiple of L, so that none is longer than L tokens. A
block of L tokens has the runs that start in it: the first start at its border or after it, and the last may end in the
next block, so that they are up to 2 L - 1 tokens, but L wherever a document goes on.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl


def chunk_runs(chunk_starts: jax.Array, chunk_size: int) -> jax.Array:
    """[B, T] int32: from each token how many tokens further the next run starts, 1 or more; the row's end counts.

    Args:
      chunk_starts: [B, T] int32, array index of the first token of the token's chunk, negative outside of chunks.
      chunk_size: L.
    """
    tokens = chunk_starts.shape[1]
    token = jnp.arange(tokens, dtype=jnp.int32)[None, :]
    is_padding = chunk_starts < 0
    follows_chunk = jnp.pad(~is_padding, ((0, 0), (1, 0)))[:, :-1]
    starts = jnp.where(is_padding, (token % chunk_size == 0) | follows_chunk, chunk_starts == token)
    after = jnp.where(starts, token, tokens)[:, 1:]
    after = jnp.pad(after, ((0, 0), (0, 1)), constant_values=tokens)
    return (jax.lax.cummin(after, axis=1, reverse=True) - token).astype(jnp.int32)


@triton.jit
def first_of_block(runs, row, block, tokens, L: tl.constexpr):
    """Array index of the first token of a block's runs, T where no run starts in it or later; of one or more blocks."""
    before = block * L - 1
    further = tl.load(runs + row * tokens + before, mask=(before >= 0) & (before < tokens), other=1)
    return tl.minimum(before + further, tokens)
