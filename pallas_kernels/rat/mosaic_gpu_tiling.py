"""Which calls the Mosaic GPU kernels take, and how the arrays of others are padded to whole tiles."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.launch.sizes import cdiv
from pallas_kernels.rat.seen_slots import SeenSlots
from pallas_kernels.rat.shape import RatShape

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128)
TILE = 128  # tokens of a program of the forward pass, and summaries of one of the backward pass
RECURRENCE_HEAD_DIM = 128  # a channel for each thread of a warpgroup
RECURRENCE_TOKENS = 16  # whose states a thread holds in its registers
RECURRENCE_HEADS = 64  # of a group, whose bias gradients lie in shared memory
MAX_PROGRAMS = (1 << 31) - 1
_HOPPER = 9  # compute capability 9.x, whose matrix instructions (wgmma) the kernels use


def unsupported_reason(shape: RatShape) -> str | None:
    """Why the Mosaic GPU kernels cannot run a call and what comes nearest; None where they can."""
    if shape.capability is not None and shape.capability[0] != _HOPPER:
        return f"it needs a card of compute capability 9.0, this one has {shape.capability[0]}.{shape.capability[1]}"
    if shape.dtype not in DTYPES:
        return f"dtype {shape.dtype} is none of {', '.join(DTYPES)}"
    if shape.head_dim not in HEAD_DIMS:
        nearest = min(HEAD_DIMS, key=lambda size: abs(size - shape.head_dim))
        return f"head_dim {shape.head_dim} is none of {', '.join(map(str, HEAD_DIMS))}; the nearest is {nearest}"
    if shape.batch * shape.num_heads * cdiv(shape.tokens, TILE) > MAX_PROGRAMS:
        return (
            f"{shape.batch} rows of {shape.tokens} tokens and {shape.num_heads} heads are too many programs; split the "
            "batch"
        )
    return None


def takes_backward_recurrence(shape: RatShape) -> bool:
    """Whether the backward recurrence of a call that the kernels take is one of them; it is Triton's otherwise."""
    heads, length = shape.heads_per_group, shape.chunk_size
    return (
        not shape.segmented
        and shape.head_dim == RECURRENCE_HEAD_DIM
        and length <= RECURRENCE_TOKENS
        and heads <= RECURRENCE_HEADS
        and shape.tokens % 4 == 0  # copies take rows of multiples of 16 bytes,
        and length % 4 == 0
        and heads * length % 32 == 0  # and 128 bytes at a time, of scores too
    )


def padded(shape: RatShape) -> RatShape:
    """The call with as many tokens as fill whole tiles."""
    return dataclasses.replace(shape, tokens=cdiv(shape.tokens, TILE) * TILE)


def pad_tokens(shape: RatShape, x: jax.Array, axis: int) -> jax.Array:
    """Zeros follow the last token, up to a whole tile."""
    return _pad(x, axis, padded(shape).tokens)


def pad_summaries(shape: RatShape, summaries: jax.Array, seen: SeenSlots | None) -> jax.Array:
    """Zeros follow the summaries up to a whole tile, and take the place of the last one where its chunk is in part."""
    if seen is None:
        summaries, slots = summaries[:, : shape.tokens // shape.chunk_size], padded(shape).num_chunks
    else:
        slots = summaries.shape[1]
    return _pad(summaries, 1, cdiv(slots, TILE) * TILE)


def pad_seen(shape: RatShape, seen: SeenSlots | None) -> SeenSlots | None:
    """Tokens that see nothing follow the last one, up to a whole tile."""
    if seen is None or shape.tokens == padded(shape).tokens:
        return seen
    more = ((0, 0), (0, padded(shape).tokens - shape.tokens))
    end = jnp.pad(seen.end, more, mode="edge")
    first = jnp.where(jnp.arange(end.shape[1]) < shape.tokens, jnp.pad(seen.first, more), end)
    return seen._replace(first=first, end=end)


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - x.shape[i] if i == axis else 0) for i in range(x.ndim)])
