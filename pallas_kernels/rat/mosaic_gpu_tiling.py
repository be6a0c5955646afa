"""Which problems the Mosaic GPU kernels take, and how others are filled up to whole tiles."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.launch.arithmetic import cdiv
from pallas_kernels.rat.shape import Problem

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128)
TILE = 128  # tokens of a program of the forward pass, and summaries of one of the backward pass
MAX_PROGRAMS = (1 << 31) - 1


def refusal(p: Problem) -> str | None:
    """Why the Mosaic GPU kernels cannot run this problem and what comes nearest, or None where they can."""
    if p.segmented or p.continued:
        return "packed documents, and rows that go on from a state, are not taken; the Triton kernels take them"
    if p.dtype not in DTYPES:
        return f"dtype {p.dtype} is none of {', '.join(DTYPES)}"
    if min(p.batch, p.tokens, p.num_heads, p.num_groups, p.chunk_size) < 1:
        return f"every size must be 1 or more, got {p}"
    if p.num_heads % p.num_groups:
        return f"num_heads must be a multiple of num_groups, got {p.num_heads} and {p.num_groups}"
    if p.head_dim not in HEAD_DIMS:
        nearest = min(HEAD_DIMS, key=lambda size: abs(size - p.head_dim))
        return f"head_dim {p.head_dim} is none of {', '.join(map(str, HEAD_DIMS))}; the nearest is {nearest}"
    if p.batch * p.num_heads * cdiv(p.tokens, TILE) > MAX_PROGRAMS:
        return f"{p.batch} rows of {p.tokens} tokens and {p.num_heads} heads are too many programs; split the batch"
    return None


def check(p: Problem) -> None:
    """Raises NotImplementedError with the reason where the kernels refuse the problem."""
    reason = refusal(p)
    if reason is not None:
        raise NotImplementedError(f"the Mosaic GPU kernels of the RAT op refuse this shape: {reason}")


def filled(p: Problem) -> Problem:
    """The problem with as many tokens as fill whole tiles."""
    return dataclasses.replace(p, tokens=cdiv(p.tokens, TILE) * TILE)


def fill_tokens(p: Problem, x: jax.Array, axis: int) -> jax.Array:
    """Zeros follow the last token, up to a whole tile."""
    return _fill(x, axis, filled(p).tokens)


def fill_slots(p: Problem, summaries: jax.Array) -> jax.Array:
    """Zeros take the place of slots that no chunk completes, and follow them up to a whole tile."""
    return _fill(summaries[:, : p.tokens // p.chunk_size], 1, cdiv(filled(p).slots, TILE) * TILE)


def _fill(x: jax.Array, axis: int, size: int) -> jax.Array:
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - x.shape[i] if i == axis else 0) for i in range(x.ndim)])
