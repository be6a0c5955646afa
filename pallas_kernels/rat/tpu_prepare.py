"""What the kernels need beside the caller's arrays: padded heads and chunks, rotations, documents. Plain XLA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.rat.tpu_tiling import Plan

RADIX = 1024  # of the digits that chunk indices are looked up by


@dataclasses.dataclass(frozen=True)
class Places:
    """Where rows and slots stand. All but `slot_chunks` are None if every row is one document without padding."""

    row_chunks: jax.Array | None  # int32 [B, rows]: index of the row's chunk in its document
    slot_chunks: jax.Array  # int32 [1 or B, tile_slots], for the tables of the summary kernel
    rows: jax.Array | None  # as `recurrence.summaries` takes them
    slot_ends: jax.Array | None
    slots: jax.Array | None  # as `attention.attention` takes them


def places(plan: Plan, positions: jax.Array | None, segment_ids: jax.Array | None) -> Places:
    """Numbers the documents of every row from 1 and finds the row that completes each slot's chunk."""
    if not plan.segmented:
        return Places(None, jnp.arange(plan.tile_slots, dtype=jnp.int32)[None], None, None, None)
    token = segment_ids != 0
    document = jnp.where(token, 1 + jnp.cumsum(token & (positions == 0), axis=1, dtype=jnp.int32), 0)
    document = pad_chunks(plan, document)
    token = document > 0
    positions = pad_chunks(plan, positions.astype(jnp.int32))
    start = token & (positions % plan.chunk == 0)
    end = token & (positions % plan.chunk == plan.chunk - 1)
    extra = ((0, 0), (0, plan.tile_slots * plan.stride - plan.rows))
    row = jnp.where(end, jnp.arange(plan.rows, dtype=jnp.int32), -1)
    row = jnp.pad(row, extra, constant_values=-1)
    slot_ends = jnp.max(row.reshape(plan.batch, plan.tile_slots, plan.stride), axis=2)
    at = jnp.maximum(slot_ends, 0)
    slot_chunks = jnp.take_along_axis(positions, at, axis=1) // plan.chunk
    slot_documents = jnp.where(slot_ends < 0, -1, jnp.take_along_axis(document, at, axis=1))
    slots = jnp.stack([slot_documents, slot_ends], axis=1)[:, :, : plan.slots]
    unused = plan.slot_blocks * plan.slot_block - plan.slots
    rows = jnp.stack([to_tiles(plan, document), to_tiles(plan, start.astype(jnp.int32))], axis=2)
    return Places(
        row_chunks=positions // plan.chunk,
        slot_chunks=slot_chunks,
        rows=rows,
        slot_ends=slot_ends.reshape(plan.batch, -1, plan.slots_per_tile, 1),
        slots=jnp.pad(slots, ((0, 0), (0, 0), (0, unused)), constant_values=-1),
    )


def rotations(plan: Plan, chunks: jax.Array, base: float | None) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angles of chunk indices [...]: float32 [..., lanes], the sine signed for `swap_halves`.

    Channel pairs are (i, i + H/2) of the padded head: x cos + swap(x) sin rotates, x cos - swap(x) sin rotates back.
    Angles add up from the digits of the index, each looked up in a float64 table: trigonometry of large arguments
    takes XLA for TPU longer to compile than the kernels do, and loses digits.
    """
    half = plan.lanes // 2
    if base is None:
        shape = (*chunks.shape, plan.lanes)
        return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    limit = 2**31 // plan.chunk if plan.segmented else plan.tile_slots
    frequencies = base ** (-2.0 * np.arange(half) / plan.head_dim)
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


def row_rotations(plan: Plan, places: Places, base: float | None) -> tuple[jax.Array, jax.Array]:
    """`rotations` of every row, [1 or B, rows, lanes]."""
    if plan.segmented:
        return rotations(plan, places.row_chunks, base)
    shape = (1, plan.tile_slots, plan.stride, plan.lanes)
    tables = (jnp.broadcast_to(table[:, :, None], shape) for table in rotations(plan, places.slot_chunks, base))
    cos, sin = (table.reshape(1, -1, plan.lanes)[:, : plan.rows] for table in tables)
    return cos, sin


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x cos + swap(x) sin in float32."""
    x = x.astype(jnp.float32)
    return x * cos + jnp.roll(x, x.shape[-1] // 2, axis=-1) * sin


def rotate_query(plan: Plan, projected: jax.Array, places: Places, base: float | None) -> jax.Array:
    """The query columns rotated by their chunk and scaled by 1/sqrt(H): [B, rows, G lanes]."""
    first, width = 3 * plan.heads * plan.lanes, plan.groups * plan.lanes
    query = projected[:, :, first : first + width].astype(jnp.float32) * plan.head_dim**-0.5
    if base is not None:
        cos, sin = row_rotations(plan, places, base)
        query = rotate(query.reshape(plan.batch, plan.rows, plan.groups, plan.lanes), cos[:, :, None], sin[:, :, None])
    return query.reshape(plan.batch, plan.rows, width).astype(plan.dtype)


def rotate_back_query(plan: Plan, d_query: jax.Array, places: Places, base: float | None) -> jax.Array:
    """The transpose of `rotate_query`, float32 [B, rows, G lanes] to the same."""
    d_query = d_query * plan.head_dim**-0.5
    if base is None:
        return d_query
    cos, sin = row_rotations(plan, places, base)
    d_query = d_query.reshape(plan.batch, plan.rows, plan.groups, plan.lanes)
    return rotate(d_query, cos[:, :, None], -sin[:, :, None]).reshape(plan.batch, plan.rows, -1)


def pad_heads(plan: Plan, x: jax.Array) -> jax.Array:
    """Pads every H channels of the last axis to `lanes`, each half on its own if there are two."""
    if plan.lanes == plan.head_dim:
        return x
    halves = 2 - plan.head_dim % 2
    x = x.reshape(*x.shape[:-1], -1, plan.head_dim // halves)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, plan.lanes // halves - x.shape[-1])])
    return x.reshape(*x.shape[:-2], -1)


def unpad_heads(plan: Plan, x: jax.Array) -> jax.Array:
    """Undoes `pad_heads`."""
    if plan.lanes == plan.head_dim:
        return x
    halves = 2 - plan.head_dim % 2
    x = x.reshape(*x.shape[:-1], -1, plan.lanes // halves)[..., : plan.head_dim // halves]
    return x.reshape(*x.shape[:-2], -1)


def pad_chunks(plan: Plan, x: jax.Array) -> jax.Array:
    """[B, T, ...] -> [B, rows, ...]: zeros after every chunk, if the plan pads chunks."""
    if not plan.padded_chunks:
        return x
    ends = [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, [(0, 0), (0, plan.slots * plan.chunk - plan.tokens), *ends])
    x = x.reshape(plan.batch, plan.slots, plan.chunk, *x.shape[2:])
    x = jnp.pad(x, [(0, 0), (0, 0), (0, plan.stride - plan.chunk), *ends])
    return x.reshape(plan.batch, plan.rows, *x.shape[3:])


def unpad_chunks(plan: Plan, x: jax.Array) -> jax.Array:
    """Undoes `pad_chunks`."""
    if not plan.padded_chunks:
        return x
    x = x.reshape(plan.batch, plan.slots, plan.stride, *x.shape[2:])[:, :, : plan.chunk]
    return x.reshape(plan.batch, plan.slots * plan.chunk, *x.shape[3:])[:, : plan.tokens]


def to_tiles(plan: Plan, x: jax.Array) -> jax.Array:
    """[..., rows] -> [..., tiles, tile], zeros past the end."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, plan.tiles * plan.tile - plan.rows)])
    return x.reshape(*x.shape[:-1], plan.tiles, plan.tile)


def from_tiles(plan: Plan, x: jax.Array) -> jax.Array:
    """[..., tiles, tile] -> [..., rows]."""
    return x.reshape(*x.shape[:-2], -1)[..., : plan.rows]


def slots_from_tiles(plan: Plan, x: jax.Array) -> jax.Array:
    """[B, tiles, slots of a tile, N lanes] -> [B, slots, N lanes]; of the tiles that share a slot one is not zero."""
    if plan.tiles_per_slot > 1:
        missing = plan.tile_slots * plan.tiles_per_slot - plan.tiles
        x = jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)))
        x = jnp.sum(x.reshape(plan.batch, plan.tile_slots, plan.tiles_per_slot, -1), axis=2, dtype=x.dtype)
    return x.reshape(plan.batch, plan.tile_slots, -1)[:, : plan.slots]


def slots_to_tiles(plan: Plan, x: jax.Array) -> jax.Array:
    """[B, slots or more, N lanes] -> [B, slot tiles, slots of a tile, N lanes]."""
    x = x[:, : plan.slots]
    x = jnp.pad(x, ((0, 0), (0, plan.tile_slots - plan.slots), (0, 0)))
    return x.reshape(plan.batch, -1, plan.slots_per_tile, x.shape[-1])
