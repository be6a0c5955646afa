"""The sizes of one call of the RAT mixing op, and why the Triton kernels refuse some of them."""

import dataclasses
import math
from typing import Literal

from pallas_kernels.launch.arithmetic import LOG2_E, cdiv, next_power_of_2

DTYPES = ("bfloat16", "float16", "float32")
MAX_HEAD_DIM = 256
MAX_GRID_ROWS = 65535
NEVER = 1 << 30  # in place of the token that completes a chunk, where none does
PIECE_TOKENS = 16  # tokens of a chunk whose states the backward recurrence keeps in registers


@dataclasses.dataclass(frozen=True)
class Problem:
    """Static sizes of the op; see `pallas_kernels.rat.triton` for the equations."""

    batch: int  # B
    tokens: int  # T
    num_heads: int  # N
    num_groups: int  # G; head n uses query and key group n mod G
    head_dim: int  # H
    chunk_size: int  # L
    dtype: Literal["bfloat16", "float16", "float32"]
    rope: bool
    segmented: bool  # documents are packed: segment ids and positions say where chunks begin
    continued: bool = False  # rows go on from a state; packed too
    capability: tuple[int, int] | None = None  # compute capability of the card; None: not known

    @property
    def width(self) -> int:
        """Channels of the mixed output: D = N H."""
        return self.num_heads * self.head_dim

    @property
    def projected_width(self) -> int:
        """Channels of `projected`: z, v, g of D each, q and k of G H each."""
        return 3 * self.width + 2 * self.num_groups * self.head_dim

    @property
    def slots(self) -> int:
        """Summary slots of a row: one for each array block of L tokens, the last perhaps partial."""
        return cdiv(self.tokens, self.chunk_size)

    @property
    def heads_per_group(self) -> int:
        return self.num_heads // self.num_groups

    @property
    def score_scale(self) -> float:
        """What turns q . k into a score in powers of two: log2(e) / sqrt(H)."""
        return LOG2_E / math.sqrt(self.head_dim)

    @property
    def little_shared_memory(self) -> bool:
        """Whether a program may have 99 KiB of shared memory only, on cards that are none of 8.0, 8.7, 9.x and 10.x."""
        return (
            self.capability is not None
            and self.capability not in ((8, 0), (8, 7))
            and self.capability[0] not in (9, 10)
        )

    @property
    def padded_head_dim(self) -> int:
        return max(16, next_power_of_2(self.head_dim))


def problem_of(
    projected_shape: tuple[int, ...],
    dtype: str,
    *,
    num_heads: int,
    num_groups: int,
    chunk_size: int,
    rope: bool,
    segmented: bool,
) -> Problem:
    """The problem that an array `projected` of shape [B, T, 3 D + 2 G H] belongs to; raises if the sizes do not fit."""
    batch, tokens, width = projected_shape
    head_dim, rest = divmod(width, 3 * num_heads + 2 * num_groups)
    if rest:
        raise ValueError(
            f"projected has {width} channels, which is not (3 num_heads + 2 num_groups) head_dim for num_heads "
            f"{num_heads} and num_groups {num_groups}"
        )
    return Problem(batch, tokens, num_heads, num_groups, head_dim, chunk_size, dtype, rope, segmented)


def refusal(problem: Problem) -> str | None:
    """Why the Triton kernels cannot run this problem and what comes nearest, or None where they can."""
    p = problem
    if p.dtype not in DTYPES:
        return f"dtype {p.dtype} is none of {', '.join(DTYPES)}"
    if min(p.batch, p.tokens, p.num_heads, p.num_groups, p.head_dim, p.chunk_size) < 1:
        return f"every size must be 1 or more, got {p}"
    if p.num_heads % p.num_groups:
        return f"num_heads must be a multiple of num_groups, got {p.num_heads} and {p.num_groups}"
    if p.head_dim > MAX_HEAD_DIM:
        return f"head_dim {p.head_dim} is above {MAX_HEAD_DIM}: an accumulator would not fit the registers"
    if p.rope and p.head_dim % 2:
        return f"RoPE needs an even head_dim, got {p.head_dim}; the nearest are {p.head_dim - 1} and {p.head_dim + 1}"
    if p.batch > MAX_GRID_ROWS:
        return f"batch {p.batch} is above {MAX_GRID_ROWS}, the longest grid axis; split the batch"
    return None


def check(problem: Problem) -> None:
    """Raises NotImplementedError with the reason where the kernels refuse the problem."""
    reason = refusal(problem)
    if reason is not None:
        raise NotImplementedError(f"the Triton kernels of the RAT op refuse this shape: {reason}")
