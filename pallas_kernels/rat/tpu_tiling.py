"""How one call of the RAT kernels is cut into tiles: every size static, nothing read from a grid while tracing."""

import dataclasses
import math

import jax.numpy as jnp

from pallas_kernels.launch.tpu import LANES, SUBLANES


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
class Plan:
    """Static sizes of one call.

    Kernels see heads padded to `lanes` channels and, where tiles cannot hold whole chunks of `chunk` tokens, chunks
    padded to `stride` tokens. A *slot* is the place of one chunk summary: one per `stride` array rows.
    """

    batch: int
    heads: int
    groups: int
    head_dim: int
    lanes: int  # head_dim rounded up to 128
    tokens: int  # T of the caller
    chunk: int  # L
    stride: int  # array rows from chunk to chunk, >= chunk
    tile: int  # array rows of a query tile; a multiple or a divisor of stride
    slot_block: int  # slots of a key block
    dtype: jnp.dtype
    segmented: bool  # documents and padding in the row

    @property
    def padded_chunks(self) -> bool:
        """Whether rows are inserted after every chunk; a lone chunk is never padded."""
        return self.stride != self.chunk and self.tokens > self.chunk

    @property
    def rows(self) -> int:
        """Length of the time axis that kernels see."""
        return self.slots * self.stride if self.padded_chunks else self.tokens

    @property
    def length(self) -> int:
        """Row after the last token."""
        if not self.padded_chunks:
            return self.tokens
        return (self.tokens - 1) // self.chunk * self.stride + (self.tokens - 1) % self.chunk + 1

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.tile)

    @property
    def slots(self) -> int:
        """C: chunks of the row, the last one complete or not."""
        return -(-self.tokens // self.chunk)

    @property
    def slots_per_tile(self) -> int:
        return max(1, self.tile // self.stride)

    @property
    def tiles_per_slot(self) -> int:
        return max(1, self.stride // self.tile)

    @property
    def tile_slots(self) -> int:
        """Slots that all tiles cover, at least `slots`."""
        return -(-self.tiles // self.tiles_per_slot) * self.slots_per_tile

    @property
    def slot_blocks(self) -> int:
        return -(-self.slots // self.slot_block)

    @property
    def carries(self) -> bool:
        """Whether the running state crosses from tile to tile."""
        return self.segmented or self.tiles_per_slot > 1

    @property
    def scan_span(self) -> int:
        """Most rows that a state reaches back over inside one tile."""
        return self.tile if self.segmented else min(self.stride, self.tile)

    @property
    def partial(self) -> bool:
        """Whether some rows of some tile are no tokens: past the end, or after a chunk."""
        return self.length != self.tiles * self.tile or self.padded_chunks

    def first_slot(self, tile):
        """Chunk that the first row of a tile lies in: all slots before it are complete."""
        return tile // self.tiles_per_slot * self.slots_per_tile

    def last_visible_slot(self, tile):
        """Last slot that a token of this tile may attend to; negative if there is none."""
        last = (tile + 1) * self.tile // self.stride if self.tiles_per_slot == 1 else tile // self.tiles_per_slot + 1
        # A document's chunk may end before the array block does, so with documents the tile's own slots count.
        return last - 1 if self.segmented else last - 2

    def first_visible_tile(self, slot):
        """First tile with a token that may attend to `slot`."""
        return (slot if self.segmented else slot + 1) * self.stride // self.tile


def make_plan(
    *,
    batch: int,
    tokens: int,
    width: int,
    head_dim: int,
    groups: int,
    chunk: int,
    dtype: jnp.dtype,
    segmented: bool,
    tiles: Tiles | None,
) -> Plan:
    """Chooses the tile of tokens (whole chunks if they fit) and the block of slots."""
    lanes = -(-head_dim // LANES) * LANES
    limits = default_tiles(lanes, dtype) if tiles is None else tiles
    stride, tile = _stride_and_tile(chunk, tokens, limits.tokens)
    slots = -(-tokens // chunk)
    return Plan(
        batch=batch,
        heads=width // head_dim,
        groups=groups,
        head_dim=head_dim,
        lanes=lanes,
        tokens=tokens,
        chunk=chunk,
        stride=stride,
        tile=tile,
        slot_block=min(limits.slots, -(-slots // LANES) * LANES),
        dtype=jnp.dtype(dtype),
        segmented=segmented,
    )


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
