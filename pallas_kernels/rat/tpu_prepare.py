"""What the kernels need besides the caller's arrays: padded heads and chunks, rotations, documents. Plain XLA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.rat.tpu_tiling import Tiling

RADIX = 1024  # of the digits that chunk indices are looked up by


@dataclasses.dataclass(frozen=True)
class Places:
    """Documents and chunks of rows and slots; but for `slot_chunks` None if every row is one unpadded document."""

    row_chunks: jax.Array | None  # int32 [B, rows]: index of the row's chunk in its document
    slot_chunks: jax.Array  # int32 [1 or B, tile_slots], for the tables of the summary kernel
    rows: jax.Array | None  # as `recurrence.summaries` takes them
    slot_ends: jax.Array | None
    slots: jax.Array | None  # as `attention.attention` takes them


def places(tiling: Tiling, positions: jax.Array | None, segment_ids: jax.Array | None) -> Places:
    """Numbers the documents of every row from 1 and finds the row that completes each slot's chunk."""
    if not tiling.shape.segmented:
        return Places(None, jnp.arange(tiling.tile_slots, dtype=jnp.int32)[None], None, None, None)
    token = segment_ids != 0
    document = jnp.where(token, 1 + jnp.cumsum(token & (positions == 0), axis=1, dtype=jnp.int32), 0)
    document = pad_chunks(tiling, document)
    token = document > 0
    positions = pad_chunks(tiling, positions.astype(jnp.int32))
    start = token & (positions % tiling.shape.chunk_size == 0)
    end = token & (positions % tiling.shape.chunk_size == tiling.shape.chunk_size - 1)
    extra = ((0, 0), (0, tiling.tile_slots * tiling.stride - tiling.rows))
    row = jnp.where(end, jnp.arange(tiling.rows, dtype=jnp.int32), -1)
    row = jnp.pad(row, extra, constant_values=-1)
    slot_ends = jnp.max(row.reshape(tiling.shape.batch, tiling.tile_slots, tiling.stride), axis=2)
    at = jnp.maximum(slot_ends, 0)
    slot_chunks = jnp.take_along_axis(positions, at, axis=1) // tiling.shape.chunk_size
    slot_documents = jnp.where(slot_ends < 0, -1, jnp.take_along_axis(document, at, axis=1))
    slots = jnp.stack([slot_documents, slot_ends], axis=1)[:, :, : tiling.shape.num_chunks]
    unused = tiling.slot_blocks * tiling.slot_block - tiling.shape.num_chunks
    rows = jnp.stack([to_tiles(tiling, document), to_tiles(tiling, start.astype(jnp.int32))], axis=2)
    return Places(
        row_chunks=positions // tiling.shape.chunk_size,
        slot_chunks=slot_chunks,
        rows=rows,
        slot_ends=slot_ends.reshape(tiling.shape.batch, -1, tiling.slots_per_tile, 1),
        slots=jnp.pad(slots, ((0, 0), (0, 0), (0, unused)), constant_values=-1),
    )


def rotations(tiling: Tiling, chunks: jax.Array, base: float | None) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angles of chunk indices [...]: float32 [..., lanes], the sine signed for `swap_halves`.

    Channel pairs are (i, i + H/2) of the padded head: x cos + swap(x) sin rotates, x cos - swap(x) sin rotates back.
    Angles add up from the digits of the index, each looked up in a float64 table: trigonometry of large arguments
    takes XLA for TPU longer to compile than the kernels do, and loses digits.
    """
    half = tiling.lanes // 2
    if base is None:
        shape = (*chunks.shape, tiling.lanes)
        return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    limit = 2**31 // tiling.shape.chunk_size if tiling.shape.segmented else tiling.tile_slots
    frequencies = base ** (-2.0 * np.arange(half) / tiling.shape.head_dim)
    cos, sin, place = None, None, 1
    while cos is None or place < limit:
        angles = place * np.arange(min(RADIX, limit))[:, None] * frequencies[None]
        digit = chunks // place % RADIX
        digit_cos, digit_sin = (
            jnp.take(jnp.asarray(table, jnp.float32), digit, axis=0, mode="clip")
            for table in (np.cos(angles), np.sin(angles))
        )
        if cos is None:
            cos, sin = digit_cos, digit_sin
        else:
            cos, sin = cos * digit_cos - sin * digit_sin, sin * digit_cos + cos * digit_sin
        place *= RADIX
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def row_rotations(tiling: Tiling, places: Places, base: float | None) -> tuple[jax.Array, jax.Array]:
    """`rotations` of every row, [1 or B, rows, lanes]."""
    if tiling.shape.segmented:
        return rotations(tiling, places.row_chunks, base)
    shape = (1, tiling.tile_slots, tiling.stride, tiling.lanes)
    tables = (jnp.broadcast_to(table[:, :, None], shape) for table in rotations(tiling, places.slot_chunks, base))
    cos, sin = (table.reshape(1, -1, tiling.lanes)[:, : tiling.rows] for table in tables)
    return cos, sin


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x cos + swap(x) sin in float32."""
    x = x.astype(jnp.float32)
    return x * cos + jnp.roll(x, x.shape[-1] // 2, axis=-1) * sin


def rotate_query(tiling: Tiling, projected: jax.Array, places: Places, base: float | None) -> jax.Array:
    """The query columns rotated by their chunk and scaled by 1/sqrt(H): [B, rows, G lanes]."""
    first, width = 3 * tiling.shape.num_heads * tiling.lanes, tiling.shape.num_groups * tiling.lanes
    query = projected[:, :, first : first + width].astype(jnp.float32) * tiling.shape.head_dim**-0.5
    if base is not None:
        cos, sin = row_rotations(tiling, places, base)
        query = rotate(
            query.reshape(tiling.shape.batch, tiling.rows, tiling.shape.num_groups, tiling.lanes),
            cos[:, :, None],
            sin[:, :, None],
        )
    return query.reshape(tiling.shape.batch, tiling.rows, width).astype(tiling.dtype)


def rotate_back_query(tiling: Tiling, d_query: jax.Array, places: Places, base: float | None) -> jax.Array:
    """The transpose of `rotate_query`, float32 [B, rows, G lanes] to the same."""
    d_query = d_query * tiling.shape.head_dim**-0.5
    if base is None:
        return d_query
    cos, sin = row_rotations(tiling, places, base)
    d_query = d_query.reshape(tiling.shape.batch, tiling.rows, tiling.shape.num_groups, tiling.lanes)
    return rotate(d_query, cos[:, :, None], -sin[:, :, None]).reshape(tiling.shape.batch, tiling.rows, -1)


def pad_heads(tiling: Tiling, x: jax.Array) -> jax.Array:
    """Pads every H channels of the last axis to `lanes`, each half on its own if there are two."""
    if tiling.lanes == tiling.shape.head_dim:
        return x
    halves = 2 - tiling.shape.head_dim % 2
    x = x.reshape(*x.shape[:-1], -1, tiling.shape.head_dim // halves)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, tiling.lanes // halves - x.shape[-1])])
    return x.reshape(*x.shape[:-2], -1)


def unpad_heads(tiling: Tiling, x: jax.Array) -> jax.Array:
    """Undoes `pad_heads`."""
    if tiling.lanes == tiling.shape.head_dim:
        return x
    halves = 2 - tiling.shape.head_dim % 2
    x = x.reshape(*x.shape[:-1], -1, tiling.lanes // halves)[..., : tiling.shape.head_dim // halves]
    return x.reshape(*x.shape[:-2], -1)


def pad_chunks(tiling: Tiling, x: jax.Array) -> jax.Array:
    """[B, T, ...] -> [B, rows, ...]: zeros after every chunk, if the tiling pads chunks."""
    if not tiling.padded_chunks:
        return x
    ends = [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, [(0, 0), (0, tiling.shape.num_chunks * tiling.shape.chunk_size - tiling.shape.tokens), *ends])
    x = x.reshape(tiling.shape.batch, tiling.shape.num_chunks, tiling.shape.chunk_size, *x.shape[2:])
    x = jnp.pad(x, [(0, 0), (0, 0), (0, tiling.stride - tiling.shape.chunk_size), *ends])
    return x.reshape(tiling.shape.batch, tiling.rows, *x.shape[3:])


def unpad_chunks(tiling: Tiling, x: jax.Array) -> jax.Array:
    """Undoes `pad_chunks`."""
    if not tiling.padded_chunks:
        return x
    x = x.reshape(tiling.shape.batch, tiling.shape.num_chunks, tiling.stride, *x.shape[2:])[
        :, :, : tiling.shape.chunk_size
    ]
    return x.reshape(tiling.shape.batch, tiling.shape.num_chunks * tiling.shape.chunk_size, *x.shape[3:])[
        :, : tiling.shape.tokens
    ]


def to_tiles(tiling: Tiling, x: jax.Array) -> jax.Array:
    """[..., rows] -> [..., tiles, tile], zeros past the end."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, tiling.tiles * tiling.tile - tiling.rows)])
    return x.reshape(*x.shape[:-1], tiling.tiles, tiling.tile)


def from_tiles(tiling: Tiling, x: jax.Array) -> jax.Array:
    """[..., tiles, tile] -> [..., rows]."""
    return x.reshape(*x.shape[:-2], -1)[..., : tiling.rows]


def slots_from_tiles(tiling: Tiling, x: jax.Array) -> jax.Array:
    """[B, tiles, slots of a tile, N lanes] -> [B, slots, N lanes]; of the tiles that share a slot one is not zero."""
    if tiling.tiles_per_slot > 1:
        missing = tiling.tile_slots * tiling.tiles_per_slot - tiling.tiles
        x = jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)))
        x = jnp.sum(x.reshape(tiling.shape.batch, tiling.tile_slots, tiling.tiles_per_slot, -1), axis=2, dtype=x.dtype)
    return x.reshape(tiling.shape.batch, tiling.tile_slots, -1)[:, : tiling.shape.num_chunks]


def slots_to_tiles(tiling: Tiling, x: jax.Array) -> jax.Array:
    """[B, slots or more, N lanes] -> [B, slot tiles, slots of a tile, N lanes]."""
    x = x[:, : tiling.shape.num_chunks]
    x = jnp.pad(x, ((0, 0), (0, tiling.tile_slots - tiling.shape.num_chunks), (0, 0)))
    return x.reshape(tiling.shape.batch, -1, tiling.slots_per_tile, x.shape[-1])
