"""Which calls the Mosaic GPU kernels of linear attention take, and the tiles and blocks of one."""

import dataclasses

from pallas_kernels.launch.sizes import ROWS, cdiv
from pallas_kernels.linear_attention.shape import LinearAttentionShape

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128)
TILES = 4  # of ROWS tokens, between which scores are made: a block, for which a state is kept in memory
BLOCK = TILES * ROWS
MULTIPROCESSORS = 132  # of the largest Hopper cards; smaller ones run the programs that are left afterwards
_HOPPER = 9  # compute capability 9.x, whose matrix instructions (wgmma) the kernels use


def unsupported_reason(shape: LinearAttentionShape) -> str | None:
    """Why the Mosaic GPU kernels cannot run a call and what comes nearest; None where they can."""
    if shape.capability is not None and shape.capability[0] != _HOPPER:
        return f"it needs a card of compute capability 9.x, this one has {shape.capability[0]}.{shape.capability[1]}"
    if shape.continued:
        return "it takes no state; implementation 'xla' does"
    if shape.segmented or shape.initial_heads:
        return "it takes neither packed documents nor an initial state; implementation 'triton' does"
    if shape.dtype not in DTYPES:
        return f"dtype {shape.dtype} is none of {', '.join(DTYPES)}; implementation 'triton' takes float32"
    if shape.head_dim not in HEAD_DIMS:
        nearest = min(HEAD_DIMS, key=lambda size: abs(size - shape.head_dim))
        return f"head_dim {shape.head_dim} is none of {', '.join(map(str, HEAD_DIMS))}; the nearest is {nearest}"
    return None


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a call is cut. Kernels take lags of whole tiles, or of one token more; keys are shifted by the `rest`."""

    shape: LinearAttentionShape

    @property
    def rest(self) -> int:
        """Tokens by which keys and values are shifted before the kernels read them."""
        lag = min(self.shape.key_lag, self.shape.tokens)
        return 0 if lag % ROWS == 1 else lag % ROWS

    @property
    def key_lag(self) -> int:
        """The lag that the kernels see."""
        return min(self.shape.key_lag, self.shape.tokens) - self.rest

    @property
    def offset(self) -> int:
        """Key s is aligned with query s + offset: the lag in whole tiles, which begin where copies may."""
        return self.key_lag // ROWS * ROWS

    @property
    def strict(self) -> bool:
        """True: mask s < t; False: mask s <= t (aligned indices)."""
        return self.key_lag > self.offset

    @property
    def blocks(self) -> int:
        """C: blocks of a row of queries."""
        return cdiv(self.shape.tokens, BLOCK)

    @property
    def span(self) -> int:
        """Blocks of a segment; the states of segments are summed in parallel, the blocks of one in order."""
        rows = self.shape.batch * self.shape.key_heads
        return cdiv(self.blocks, min(self.blocks, max(1, MULTIPROCESSORS // rows)))

    @property
    def segments(self) -> int:
        return cdiv(self.blocks, self.span)
