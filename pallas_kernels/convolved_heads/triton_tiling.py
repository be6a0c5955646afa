"""Which calls the Triton kernels of convolved heads take, and how rows and channels are divided among programs."""

import dataclasses
from typing import Any

from pallas_kernels.convolved_heads.shape import LENGTH_EPSILON, ConvolvedHeadsShape
from pallas_kernels.launch.sizes import cdiv, next_power_of_2
from pallas_kernels.launch.triton import DTYPES, MAX_GRID_ROWS, MAX_HEAD_DIM, missing_dependency

MAX_TAPS = 4  # whose weights, sums and tokens fit the registers
_PROGRAMS = 8192  # that fill a card: rows are cut where there are fewer
_LEAST_SPAN = 64  # tokens: those around a span are read twice
_MOST_SPAN = 256  # tokens: longer ones would leave cards idle at the end


def unsupported_reason(shape: ConvolvedHeadsShape) -> str | None:
    """Why the Triton kernels cannot run a call and what comes nearest; None where they can."""
    if shape.dtype not in DTYPES:
        return f"dtype {shape.dtype} is none of {', '.join(DTYPES)}"
    if shape.key_dim > MAX_HEAD_DIM:
        return f"it takes keys of at most {MAX_HEAD_DIM} channels, got {shape.key_dim}; nearest: {MAX_HEAD_DIM}"
    if shape.taps > MAX_TAPS:
        return f"it takes convolutions of at most {MAX_TAPS} tokens, got {shape.taps}; nearest: {MAX_TAPS}"
    if shape.batch > MAX_GRID_ROWS:
        return f"batch {shape.batch} is above {MAX_GRID_ROWS}, the longest grid axis; split the batch"
    return missing_dependency()


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What a program of one kernel takes, and how it is compiled."""

    channels: int  # a power of 2; heads that are wider are taken one by one
    warps: int
    piece: int  # tokens of a step; with fewer than taps - 1 Triton copies nothing ahead
    stages: int = 1  # pieces that are copied ahead into shared memory, and the one that is used
    span: int | None = None  # tokens of a program, a multiple of `piece`; None: as many as leave enough programs


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a call is cut; the blocks of each kernel are chosen where None is given."""

    shape: ConvolvedHeadsShape
    of_forward: Blocks | None = None
    of_backward: Blocks | None = None

    @property
    def forward_blocks(self) -> Blocks:
        return self.of_forward or Blocks(256, 1, 8, 2)  # loads of 16 bytes a thread

    @property
    def backward_blocks(self) -> Blocks:
        return self.of_backward or Blocks(128, 1, 4, 2)  # twice the channels take 221 registers for 96

    def span(self, blocks: Blocks) -> int:
        """Tokens of a program."""
        if blocks.span is not None:
            return blocks.span
        programs = self.shape.batch * self._channel_blocks(blocks)
        wanted = cdiv(self.shape.tokens, max(1, _PROGRAMS // programs))
        return cdiv(min(max(wanted, _LEAST_SPAN), _MOST_SPAN), blocks.piece) * blocks.piece

    def spans(self, blocks: Blocks) -> int:
        """Of a row."""
        return cdiv(self.shape.tokens, self.span(blocks))

    def grid(self, blocks: Blocks) -> tuple[int, int]:
        """A program for every row, span and block of channels."""
        return self._channel_blocks(blocks) * self.spans(blocks), self.shape.batch

    def constants(self, blocks: Blocks) -> tuple[tuple[str, Any], ...]:
        """Of both kernels."""
        shape = self.shape
        key_heads, key_columns, value_columns = self._columns(blocks)
        return (
            ("KEY_WIDTH", shape.key_width),
            ("VALUE_WIDTH", shape.value_width),
            ("KEY_DIM", shape.key_dim),
            ("KEY_HEADS", key_heads),
            ("KEY_COLUMNS", key_columns),
            ("VALUE_COLUMNS", value_columns),
            ("TAPS", shape.taps),
            ("SPAN", self.span(blocks)),
            ("PIECE", blocks.piece),
            ("STAGES", blocks.stages),
            ("SEGMENTED", shape.segmented),
            ("EPSILON", LENGTH_EPSILON),
        )

    def _columns(self, blocks: Blocks) -> tuple[int, int, int]:
        key_columns = next_power_of_2(self.shape.key_dim)
        return max(1, blocks.channels // key_columns), key_columns, blocks.channels

    def _channel_blocks(self, blocks: Blocks) -> int:
        key_heads, _, value_columns = self._columns(blocks)
        return 2 * cdiv(self.shape.num_heads, key_heads) + cdiv(self.shape.value_width, value_columns)
