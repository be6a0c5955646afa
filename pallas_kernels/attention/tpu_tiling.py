"""Which calls splash attention takes on TPU, and the blocks of queries and keys that it visits."""

import math
from typing import NamedTuple

import numpy as np

from pallas_kernels.attention.shape import AttentionShape
from pallas_kernels.launch.sizes import LANES, cdiv

DTYPES = ("bfloat16", "float32")
MAX_HEAD_DIM = 256
_BLOCK = 512  # queries and keys of a step
_MAX_STEPS = 1 << 18  # of a head, in 3 bytes each; scalar memory has 1 MiB


def unsupported_reason(shape: AttentionShape) -> str | None:
    """Why the kernels do not run a call and what comes nearest; None where they do. Rows are padded to whole blocks."""
    if not shape.own_keys:
        return "keys must be known to be those of the queries' own tokens, in their order: no cache"
    if reason := unsupported_reason_of_heads(shape):
        return reason
    block = block_size(shape.tokens)
    count, reach = _sizes(shape.tokens, shape.window, block)
    width = cdiv(reach + 1, LANES) * LANES  # as the steps lie in memory
    if count * width > _MAX_STEPS:
        nearest = block * max(math.isqrt(_MAX_STEPS), _MAX_STEPS // width)
        return f"scalar memory does not hold the steps of rows of {shape.tokens} tokens; nearest: {nearest} tokens"
    return None


def unsupported_reason_of_heads(shape: AttentionShape) -> str | None:
    """As `unsupported_reason`, of keys that are not the queries' own: any number of them, and of queries."""
    if shape.dtype not in DTYPES:
        return f"dtype {shape.dtype} is none of {', '.join(DTYPES)}; nearest: float32"
    if shape.head_dim > MAX_HEAD_DIM:
        return f"it takes heads of at most {MAX_HEAD_DIM} channels, got {shape.head_dim}; nearest: {MAX_HEAD_DIM}"
    return None


def block_size(tokens: int) -> int:
    """Queries and keys of a block: the most that pad a row by no more than an eighth, or the least."""
    sizes = (_BLOCK >> shift for shift in range((_BLOCK // LANES).bit_length()))
    return next((size for size in sizes if -tokens % size <= tokens // 8), LANES)


class Steps(NamedTuple):
    """What the steps of a kernel read and whether they compute, as they lie in scalar memory, of which there is little.

    Those of the blocks of queries [1, count, steps], or of the blocks of keys [1, steps, count].
    """

    reads: np.ndarray  # the block of keys, or of queries
    runs: np.ndarray


def steps_of_queries(tokens: int, window: int | None, block: int) -> Steps:
    """Queries of block i see keys of the blocks from i - reach to i; a step that is left over has what is read next."""
    count, reach = _sizes(tokens, window, block)
    place, step = np.arange(count)[:, None], np.arange(reach + 1)[None]
    reads = np.maximum(place - reach, 0) + step
    runs = reads <= place
    return _steps(np.where(runs, reads, np.maximum(place + 1 - reach, 0)), runs)


def steps_of_keys(tokens: int, window: int | None, block: int) -> Steps:
    """Keys of block j are seen by queries of the blocks from j to j + reach; a step that is left over has the first."""
    count, reach = _sizes(tokens, window, block)
    place, step = np.arange(count)[None], np.arange(reach + 1)[:, None]
    runs = place + step < count
    return _steps(np.where(runs, place + step, place), runs)


def _sizes(tokens: int, window: int | None, block: int) -> tuple[int, int]:
    """Blocks of a row, and how many earlier ones are seen from one."""
    count = cdiv(tokens, block)
    return count, count - 1 if window is None else min(count - 1, cdiv(window, block))


def _steps(reads: np.ndarray, runs: np.ndarray) -> Steps:
    dtype = np.int8 if reads.max() <= np.iinfo(np.int8).max else np.int16
    return Steps(reads[None].astype(dtype), runs[None].astype(np.int8))
