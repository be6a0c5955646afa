"""Which calls the Mosaic GPU kernels take, and how the arrays of others are padded to whole tiles."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.launch.sizes import cdiv
from pallas_kernels.rat.shape import RatShape

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128)
TILE = 128  # tokens of a program of the forward pass, and summaries of one of the backward pass
MAX_PROGRAMS = (1 << 31) - 1
_HOPPER = 9  # compute capability 9.x, whose matrix instructions (wgmma) the kernels use


def unsupported_reason(shape: RatShape) -> str | None:
    """Why the Mosaic GPU kernels cannot run a call and what comes nearest; None where they can."""
    if shape.capability is not None and shape.capability[0] != _HOPPER:
        return f"it needs a card of compute capability 9.0, this one has {shape.capability[0]}.{shape.capability[1]}"
    if shape.segmented or shape.continued:
        return "it takes neither packed documents nor a state; implementation 'triton' does"
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


def padded(shape: RatShape) -> RatShape:
    """The call with as many tokens as fill whole tiles."""
    return dataclasses.replace(shape, tokens=cdiv(shape.tokens, TILE) * TILE)


def pad_tokens(shape: RatShape, x: jax.Array, axis: int) -> jax.Array:
    """Zeros follow the last token, up to a whole tile."""
    return _pad(x, axis, padded(shape).tokens)


def pad_summaries(shape: RatShape, summaries: jax.Array) -> jax.Array:
    """Zeros take the place of summaries that no chunk completes, and follow them up to a whole tile."""
    complete = summaries[:, : shape.tokens // shape.chunk_size]
    return _pad(complete, 1, cdiv(padded(shape).num_chunks, TILE) * TILE)


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - x.shape[i] if i == axis else 0) for i in range(x.ndim)])
