"""Which calls the Triton kernels of one query a row take, and how keys are divided among programs."""

from typing import NamedTuple

from pallas_kernels.attention.shape import AttentionShape
from pallas_kernels.launch.sizes import cdiv, next_power_of_2
from pallas_kernels.launch.triton import DTYPES, MAX_GRID_ROWS, MAX_HEAD_DIM, missing_dependency

# Channels of all query heads of a key head, padded, whose accumulators fit the registers and operands shared memory.
MAX_SHARED = {"bfloat16": 64 * 256, "float16": 64 * 256, "float32": 32 * 256}
ENOUGH_PROGRAMS = 512  # fewer rows times key heads are split
MAX_SPLITS = 128  # whose parts fit the registers of the program that joins them
_LEAST_HEADS = 16  # of the matrix units


class Tile(NamedTuple):
    """What a program holds at once."""

    keys: int
    heads: int  # query heads, padded
    channels: int  # padded
    warps: int
    stages: int  # tiles of keys and values on their way


def unsupported_reason(shape: AttentionShape) -> str | None:
    """Why the kernels cannot run a call and what comes nearest; None where they can."""
    if shape.tokens != 1 or shape.own_keys:
        return "it takes one query a row and the keys of a cache; implementation 'xla' takes all calls"
    if shape.dtype not in DTYPES:
        return f"dtype {shape.dtype} is none of {', '.join(DTYPES)}"
    if shape.head_dim > MAX_HEAD_DIM:
        return f"head_dim {shape.head_dim} is above {MAX_HEAD_DIM}: an accumulator would not fit the registers"
    heads, channels = _padded(shape)
    if heads * channels > MAX_SHARED[shape.dtype]:
        return (
            f"{shape.num_heads // shape.key_heads} query heads a key head, of {shape.head_dim} channels, are too many: "
            f"with {channels} channels and dtype {shape.dtype} it takes {MAX_SHARED[shape.dtype] // channels}"
        )
    if shape.batch > MAX_GRID_ROWS:
        return f"batch {shape.batch} is above {MAX_GRID_ROWS}, the longest grid axis; split the batch"
    return missing_dependency()


def tile(shape: AttentionShape) -> Tile:
    """The block of keys that a program reads at once.

    With fewer warps accumulators do not fit the registers; with more float32 keys neither do the operands of their
    products, and with more keys of many long heads the 99 KiB of shared memory of some cards do not suffice.
    """
    heads, channels = _padded(shape)
    is_float32 = shape.dtype == "float32"
    warps = min(8, max(4 if is_float32 else 2, heads * channels // 1024))
    keys = 16 if is_float32 else 32 if heads * channels > 8192 else 64
    return Tile(keys=keys, heads=heads, channels=channels, warps=warps, stages=2)


def _padded(shape: AttentionShape) -> tuple[int, int]:
    """Query heads of a key head, and their channels."""
    heads = max(_LEAST_HEADS, next_power_of_2(shape.num_heads // shape.key_heads))
    return heads, max(16, next_power_of_2(shape.head_dim))


def splits(shape: AttentionShape, num_keys: int) -> int:
    """Programs that share the keys of a row and key head."""
    wanted = cdiv(ENOUGH_PROGRAMS, shape.batch * shape.key_heads)
    return max(1, min(wanted, MAX_SPLITS, cdiv(num_keys, tile(shape).keys)))


def join_warps(shape: AttentionShape, num_keys: int) -> int:
    """Of a program that joins the parts of a query head, all of which it holds."""
    held = next_power_of_2(splits(shape, num_keys)) * tile(shape).channels
    return min(16, max(1, held // 2048))
