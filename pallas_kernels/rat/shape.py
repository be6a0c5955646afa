"""The sizes of one call of the RAT mixing op, as every back end and the plain XLA implementation read them."""

import dataclasses
import math

from pallas_kernels.launch.sizes import LOG2_E, cdiv


@dataclasses.dataclass(frozen=True)
class RatShape:
    """Static sizes of the op on one device; see `pallas_kernels.rat.triton` for the equations.

    Raises:
      ValueError: sizes that no implementation takes: the message names them.
    """

    batch: int  # B
    tokens: int  # T
    num_heads: int  # N
    num_groups: int  # G; head n uses query and key group n mod G
    head_dim: int  # H
    chunk_size: int  # L
    dtype: str  # of `projected`, by name
    rope_base: float | None  # None: no rotation
    segmented: bool  # documents are packed: segment ids and positions say where chunks begin
    continued: bool = False  # rows continue from a state; packed too
    capability: tuple[int, int] | None = None  # compute capability of the CUDA device; None: unknown, or none

    def __post_init__(self):
        if min(self.batch, self.tokens, self.num_heads, self.num_groups, self.head_dim, self.chunk_size) < 1:
            raise ValueError(f"every size must be 1 or more, got {self}")
        if self.num_heads % self.num_groups:
            raise ValueError(f"num_heads must be a multiple of num_groups, got {self.num_heads} and {self.num_groups}")
        if self.rope and self.head_dim % 2:
            below, above = self.head_dim - 1, self.head_dim + 1
            raise ValueError(f"RoPE needs an even head_dim, got {self.head_dim}; the nearest are {below} and {above}")

    @property
    def rope(self) -> bool:
        return self.rope_base is not None

    @property
    def width(self) -> int:
        """Channels of the mixed output: D = N H."""
        return self.num_heads * self.head_dim

    @property
    def projected_width(self) -> int:
        """Channels of `projected`: z, v, g of D each, q and k of G H each."""
        return 3 * self.width + 2 * self.num_groups * self.head_dim

    @property
    def num_chunks(self) -> int:
        """C: places for the summaries of a row, one for each array block of L tokens, the last perhaps partial."""
        return cdiv(self.tokens, self.chunk_size)

    @property
    def heads_per_group(self) -> int:
        return self.num_heads // self.num_groups

    @property
    def score_scale(self) -> float:
        """What turns q . k into a score in powers of two: log2(e) / sqrt(H)."""
        return LOG2_E / math.sqrt(self.head_dim)
