"""Which calls the TPU kernels take, and how one is cut into tiles: all static, nothing read from a grid."""

import dataclasses
import math

import jax.numpy as jnp

from pallas_kernels.launch.sizes import LANES, SUBLANES, cdiv
from pallas_kernels.rat.shape import RatShape

DTYPES = ("bfloat16", "float32")
MAX_HEAD_DIM = 512


def unsupported_reason(shape: RatShape) -> str | None:
    """Why the TPU kernels cannot run a call and what comes nearest; None where they can.

    Any T and any chunk size run; heads are padded to a multiple of 128 channels.
    """
    if shape.continued:
        return "it takes no state; implementations 'triton' and 'xla' do"
    if shape.dtype not in DTYPES:
        return f"dtype {shape.dtype} is none of {', '.join(DTYPES)}"
    if shape.head_dim > MAX_HEAD_DIM:
        return f"it takes heads of at most {MAX_HEAD_DIM} channels, got {shape.head_dim}; nearest: {MAX_HEAD_DIM}"
    return None


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of the blocks that one kernel step works on; both are upper bounds."""

    tokens: int  # rows of a query tile
    slots: int  # chunk summaries of a key block; a multiple of 128


def default_tiles(lanes: int, dtype: jnp.dtype) -> Tiles:
    """Tiles whose blocks, accumulators and scores fit 16 MiB of VMEM, the least that a supported TPU has."""
    tokens = 512 * 256 // (lanes * jnp.dtype(dtype).itemsize)
    return Tiles(tokens=min(512, max(64, tokens)), slots=512)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a call is cut.

    Kernels see heads padded to `lanes` channels and, where tiles cannot hold whole chunks, chunks padded to `stride`
    tokens. A *slot* is the place of one chunk summary: one per `stride` array rows.
    """

    shape: RatShape
    lanes: int  # head_dim rounded up to 128
    stride: int  # array rows from chunk to chunk, >= chunk_size
    tile: int  # array rows of a query tile; a multiple or a divisor of stride
    slot_block: int  # slots of a key block

    @classmethod
    def of(cls, shape: RatShape, tiles: Tiles | None) -> "Tiling":
        """Chooses the tile of tokens (whole chunks if they fit) and the block of slots."""
        lanes = cdiv(shape.head_dim, LANES) * LANES
        limits = default_tiles(lanes, shape.dtype) if tiles is None else tiles
        stride, tile = _stride_and_tile(shape.chunk_size, shape.tokens, limits.tokens)
        return cls(shape, lanes, stride, tile, slot_block=min(limits.slots, cdiv(shape.num_chunks, LANES) * LANES))

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.shape.dtype)

    @property
    def padded_chunks(self) -> bool:
        """Whether rows are inserted after every chunk; a lone chunk is never padded."""
        return self.stride != self.shape.chunk_size and self.shape.tokens > self.shape.chunk_size

    @property
    def rows(self) -> int:
        """Length of the time axis that kernels see."""
        return self.shape.num_chunks * self.stride if self.padded_chunks else self.shape.tokens

    @property
    def length(self) -> int:
        """Row after the last token."""
        if not self.padded_chunks:
            return self.shape.tokens
        chunk, place = divmod(self.shape.tokens - 1, self.shape.chunk_size)
        return chunk * self.stride + place + 1

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.tile)

    @property
    def slots_per_tile(self) -> int:
        return max(1, self.tile // self.stride)

    @property
    def tiles_per_slot(self) -> int:
        return max(1, self.stride // self.tile)

    @property
    def tile_slots(self) -> int:
        """Slots that all tiles cover, at least those of the row."""
        return -(-self.tiles // self.tiles_per_slot) * self.slots_per_tile

    @property
    def slot_blocks(self) -> int:
        return -(-self.shape.num_chunks // self.slot_block)

    @property
    def carries(self) -> bool:
        """Whether the running state crosses from tile to tile."""
        return self.shape.segmented or self.tiles_per_slot > 1

    @property
    def scan_span(self) -> int:
        """Most rows that a state reaches back over inside one tile."""
        return self.tile if self.shape.segmented else min(self.stride, self.tile)

    @property
    def partial(self) -> bool:
        """True if a tile contains padding rows: past the end, or after a chunk."""
        return self.length != self.tiles * self.tile or self.padded_chunks

    def first_slot(self, tile):
        """Chunk that the first row of a tile lies in: all slots before it are complete."""
        return tile // self.tiles_per_slot * self.slots_per_tile

    def last_visible_slot(self, tile):
        """Last slot that a token of this tile may attend to; negative if there is none."""
        last = (tile + 1) * self.tile // self.stride if self.tiles_per_slot == 1 else tile // self.tiles_per_slot + 1
        # A document's chunk may end before the array block does, so with documents the tile's own slots count.
        return last - 1 if self.shape.segmented else last - 2

    def first_visible_tile(self, slot):
        """First tile with a token that may attend to `slot`."""
        return (slot if self.shape.segmented else slot + 1) * self.stride // self.tile


def _stride_and_tile(chunk: int, tokens: int, limit: int) -> tuple[int, int]:
    whole = math.lcm(chunk, SUBLANES)  # the least tile of whole chunks
    if whole <= limit:
        stride, unit = chunk, whole
    elif chunk <= limit - limit % SUBLANES:
        stride = unit = -(-chunk // SUBLANES) * SUBLANES
    else:
        unit = min(limit - limit % SUBLANES, -(-tokens // SUBLANES) * SUBLANES)
        stride = -(-chunk // unit) * unit
        return stride, unit
    rows = -(-tokens // chunk) * stride
    return stride, unit * min(limit // unit, -(-rows // unit))
