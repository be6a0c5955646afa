"""The sizes of one call of linear attention, its blocks, and why the Triton kernels refuse some shapes."""

import dataclasses
from typing import Literal

from pallas_kernels.launch.arithmetic import cdiv, next_power_of_2
from pallas_kernels.rat.shape import DTYPES, MAX_GRID_ROWS, MAX_HEAD_DIM


@dataclasses.dataclass(frozen=True)
class LinearProblem:
    """Static sizes of the op; see `pallas_kernels.linear_attention.triton` for the equations."""

    batch: int  # B
    tokens: int  # T
    num_heads: int  # N
    key_heads: int  # K; head n reads key head n // (N / K)
    head_dim: int  # H
    dtype: Literal["bfloat16", "float16", "float32"]
    feature_map: Literal["softmax", "relu"]
    segmented: bool  # documents are packed
    initial_rows: int = 0  # of the initial state: 0 (there is none), 1 or B
    initial_heads: int = 0  # 0, K or N
    capability: tuple[int, int] | None = None  # compute capability of the card; None: not known
    sum_programs: int = 512  # that sum up states: about four for each multiprocessor of a large card

    @property
    def shared(self) -> int:
        """Query heads of a key head."""
        return self.num_heads // self.key_heads

    @property
    def padded(self) -> int:
        """P: channels of a tile."""
        return max(16, next_power_of_2(self.head_dim))

    @property
    def little_shared_memory(self) -> bool:
        """Whether a program may have 99 KiB of shared memory only, on cards that are none of 8.0, 8.7, 9.x and 10.x."""
        known = self.capability
        return known is not None and known not in ((8, 0), (8, 7)) and known[0] not in (9, 10)

    @property
    def block(self) -> int:
        """Tokens between which scores are made; a state is kept for each block."""
        if self.dtype == "float32":
            return 32 if self.padded <= 128 else 16
        return 64 if self.padded <= 128 else 32

    @property
    def columns(self) -> int:
        """Value channels of a tile, a divisor of P."""
        if self.dtype == "float32":
            return min(self.padded, 32)
        widest = 128 if self.padded <= 128 else 64
        return min(self.padded, 32 if self.little_shared_memory else widest)

    @property
    def much_shared_memory(self) -> bool:
        """Whether a program may have 227 KiB of shared memory, as on Hopper; tiles are then loaded ahead."""
        return self.dtype != "float32" and (self.capability is None or self.capability[0] in (9, 10))

    @property
    def stages(self) -> int:
        """Heads whose tiles are on their way or in use."""
        return 2 if self.much_shared_memory else 1

    @property
    def stacked(self) -> int:
        """Query heads whose rows stand in one tile of outputs: a power of two that divides N / K."""
        if not self.much_shared_memory or self.initial_heads:  # whose tiles take the room
            return 1
        return min(self.shared & -self.shared, 2)

    @property
    def blocks(self) -> int:
        """C, of a row."""
        return cdiv(self.tokens, self.block)

    @property
    def span(self) -> int:
        """Blocks of a segment; segments are summed up side by side, blocks one after the other."""
        of_rows = self.batch * self.key_heads * 2 * (self.padded // self.columns)
        if 2 * of_rows >= self.sum_programs:  # more segments would take all products twice for little
            return self.blocks
        segments = self.sum_programs // of_rows
        return cdiv(self.blocks, min(self.blocks, segments))

    @property
    def segments(self) -> int:
        return cdiv(self.blocks, self.span)

    def constants(self) -> tuple[tuple[str, int | bool | str], ...]:
        """The constants that all kernels but the scan share."""
        return (
            ("N", self.num_heads),
            ("K", self.key_heads),
            ("H", self.head_dim),
            ("P", self.padded),
            ("BLOCK", self.block),
            ("COLUMNS", self.columns),
            ("SOFTMAX", self.feature_map == "softmax"),
            ("SEGMENTED", self.segmented),
            ("PRECISION", "ieee"),
        )

    def without_documents(self, key_heads: int) -> "LinearProblem":
        """The same, each row one document and the query heads in groups of another number."""
        return dataclasses.replace(self, segmented=False, key_heads=key_heads)

    def initial_constants(self) -> tuple[tuple[str, int], ...]:
        """Of the kernels that read the initial state; 0 heads: there is none."""
        return ("INITIAL_ROWS", self.initial_rows), ("INITIAL_HEADS", self.initial_heads)


def refusal(
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    dtype: object,
    *,
    initial_shape: tuple[int, ...] | None = None,
) -> str | None:
    """Why query [B, T, N, H], key and value [B, T, K, H] cannot run here and the nearest that can; None if they can."""
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    if name not in DTYPES:
        return f"the Triton kernels take {', '.join(DTYPES)}, got {name}; nearest: float32"
    if len(query_shape) != 4 or min(query_shape) < 1:
        return f"query must be [B, T, N, H] with sizes of 1 or more, got shape {query_shape}"
    batch, tokens, heads, head_dim = query_shape
    if len(key_shape) != 4 or (*key_shape[:2], key_shape[3]) != (batch, tokens, head_dim) or key_shape[2] < 1:
        return f"key must be [B, T, K, H]: got {key_shape}; nearest: ({batch}, {tokens}, {heads}, {head_dim})"
    key_heads = key_shape[2]
    if heads % key_heads:
        above = cdiv(heads, key_heads) * key_heads
        nearest = f"{above - key_heads} or {above}" if heads > key_heads else f"{above}"
        return f"query heads must be a multiple of key heads, got {heads} and {key_heads}; nearest: {nearest} heads"
    if head_dim > MAX_HEAD_DIM:
        return f"the Triton kernels take heads of at most {MAX_HEAD_DIM} channels, got {head_dim}; nearest: 256"
    if batch > MAX_GRID_ROWS:
        return f"batch {batch} is above the longest grid axis; nearest: {MAX_GRID_ROWS}, split the batch"
    if initial_shape is None:
        return None
    rows, states, *matrix = (*initial_shape, 0, 0)[: max(4, len(initial_shape))]
    if rows not in (1, batch) or states not in (key_heads, heads) or matrix != [2 * head_dim, head_dim]:
        nearest = (1, key_heads, 2 * head_dim, head_dim)
        return f"initial_state must be [1 or B, K or N, 2 H, H], got {initial_shape}; nearest: {nearest}"
    return None
