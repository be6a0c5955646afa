"""Which calls the Triton kernels of linear attention take, and the blocks of one."""

import dataclasses

from pallas_kernels.launch.sizes import cdiv, next_power_of_2
from pallas_kernels.launch.triton import DTYPES, MAX_GRID_ROWS, MAX_HEAD_DIM, little_shared_memory, missing_dependency
from pallas_kernels.linear_attention.shape import LinearAttentionShape


def unsupported_reason(shape: LinearAttentionShape) -> str | None:
    """Why the Triton kernels cannot run a call and what comes nearest; None where they can."""
    if shape.continued and shape.tokens > 1:
        return "it takes a state beside one token a row alone; implementation 'xla' takes more"
    if shape.key_lag:
        return f"it takes no key_lag ({shape.key_lag}); shift keys and values instead"
    if shape.dtype not in DTYPES:
        return f"dtype {shape.dtype} is none of {', '.join(DTYPES)}; nearest: float32"
    if shape.head_dim > MAX_HEAD_DIM:
        return f"it takes heads of at most {MAX_HEAD_DIM} channels, got {shape.head_dim}; nearest: {MAX_HEAD_DIM}"
    if shape.batch > MAX_GRID_ROWS:
        return f"batch {shape.batch} is above the longest grid axis; nearest: {MAX_GRID_ROWS}, split the batch"
    return missing_dependency()


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a call is cut."""

    shape: LinearAttentionShape
    sum_programs: int = 512  # that sum up states: about four for each multiprocessor of a large card

    @property
    def padded(self) -> int:
        """P: channels of a tile."""
        return max(16, next_power_of_2(self.shape.head_dim))

    @property
    def block(self) -> int:
        """Tokens between which scores are made; a state is kept for each block."""
        if self.shape.dtype == "float32":
            return 32 if self.padded <= 128 else 16
        return 64 if self.padded <= 128 else 32

    @property
    def columns(self) -> int:
        """Value channels of a tile, a divisor of P."""
        if self.shape.dtype == "float32":
            return min(self.padded, 32)
        widest = 128 if self.padded <= 128 else 64
        return min(self.padded, 32 if little_shared_memory(self.shape.capability) else widest)

    @property
    def much_shared_memory(self) -> bool:
        """Whether a program may have 227 KiB of shared memory, as on Hopper; tiles are then loaded ahead."""
        return self.shape.dtype != "float32" and (self.shape.capability is None or self.shape.capability[0] in (9, 10))

    @property
    def stages(self) -> int:
        """Heads whose tiles are on their way or in use."""
        return 2 if self.much_shared_memory else 1

    @property
    def stacked(self) -> int:
        """Query heads whose rows share one tile of outputs: a power of two that divides N / K."""
        if not self.much_shared_memory or self.shape.initial_heads:  # whose tiles take the room
            return 1
        return min(self.shape.heads_per_key & -self.shape.heads_per_key, 2)

    @property
    def blocks(self) -> int:
        """C, of a row."""
        return cdiv(self.shape.tokens, self.block)

    @property
    def span(self) -> int:
        """Blocks of a segment; segments are summed up in parallel, the blocks of one in order."""
        of_rows = self.shape.batch * self.shape.key_heads * 2 * (self.padded // self.columns)
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
            ("N", self.shape.num_heads),
            ("K", self.shape.key_heads),
            ("H", self.shape.head_dim),
            ("P", self.padded),
            ("BLOCK", self.block),
            ("COLUMNS", self.columns),
            ("SOFTMAX", self.shape.softmax),
            ("SEGMENTED", self.shape.segmented),
            ("PRECISION", "ieee"),
        )

    def without_documents(self, key_heads: int) -> "Tiling":
        """The same, each row one document and the query heads in groups of another number."""
        shape = dataclasses.replace(
            self.shape, segmented=False, key_heads=key_heads, initial_rows=0, initial_heads=0, key_lag=0
        )
        return dataclasses.replace(self, shape=shape)

    def initial_constants(self) -> tuple[tuple[str, int], ...]:
        """Of the kernels that read the initial state; 0 heads: there is none."""
        return ("INITIAL_ROWS", self.shape.initial_rows), ("INITIAL_HEADS", self.shape.initial_heads)
