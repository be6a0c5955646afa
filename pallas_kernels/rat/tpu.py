"""The RAT mixing op on TPU (arXiv 2507.04416): entry points on plain arrays of one device."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.launch.tpu import Interpret
from pallas_kernels.rat import tpu_attention, tpu_gradients, tpu_prepare, tpu_recurrence
from pallas_kernels.rat.beyond import Beyond
from pallas_kernels.rat.shape import RatShape
from pallas_kernels.rat.tpu_tiling import Tiles, Tiling

FORWARD_KERNELS = (tpu_recurrence.NAME, tpu_attention.NAME)
BACKWARD_KERNELS = (tpu_gradients.SLOTS_NAME, tpu_gradients.TOKENS_NAME)


class RatResiduals(NamedTuple):
    """What the backward pass keeps of a forward pass. C = ceil(T / L)."""

    out: jax.Array  # [B, T, D]
    log_sum_exp: jax.Array  # float32 [B, N, T], the current token's score included
    summary_key: jax.Array  # [B, C, N, H], rotated; zero where the array block completes no chunk
    summary_value: jax.Array  # [B, C, N, H]
    tile_key: jax.Array | None  # float32 [B, tiles, D padded]: running k~ before every tile, if state crosses tiles
    tile_value: jax.Array | None


@functools.partial(jax.jit, static_argnames=("shape", "interpret", "tiles"))
def rat_forward(
    shape: RatShape,
    projected: jax.Array,
    gate_bias: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    interpret: Interpret = False,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, RatResiduals]:
    """out_t = sigmoid(z_t) softmax([q_t . k~_c / sqrt(H) of earlier chunks c, q_t . k~_t / sqrt(H)]) [v~_c, v~_t].

    With f = sigmoid(g + gate_bias) in float32, k~ and v~ run as x~_t = f_t x~_{t-1} + (1 - f_t) x_t from zero at every
    chunk's start; keys and queries of different chunks are rotated by their chunk's index.

    Args:
      shape: sizes for which `tpu_tiling.unsupported_reason` has no reason.
      projected: [B, T, 3 D + 2 G H] bfloat16 or float32: z, v, g (D each), q, k (G H each).
      gate_bias: float32 [D].
      segment_ids: int32 [B, T]; 0 is padding, which leaves the state as it is; a token at position 0 starts a document.
      positions: int32 [B, T], position in the document; with `segment_ids` or not at all.
      interpret: run without a TPU, as `pallas_call` means it.
      tiles: block sizes; None is `tpu_tiling.default_tiles`.

    Returns:
      out [B, T, D] in the dtype of `projected`, and the residuals.
    """
    tiling = Tiling.of(shape, tiles)
    padded = tpu_prepare.pad_chunks(tiling, tpu_prepare.pad_heads(tiling, projected))
    bias = tpu_prepare.pad_heads(tiling, gate_bias.astype(jnp.float32))[None]
    where = tpu_prepare.places(tiling, positions, segment_ids)
    cos, sin = tpu_prepare.rotations(tiling, where.slot_chunks, shape.rope_base)
    cos, sin = (table.reshape(len(table), -1, tiling.slots_per_tile, tiling.lanes) for table in (cos, sin))
    kept = tpu_recurrence.summaries(tiling, padded, bias, cos, sin, where.rows, where.slot_ends, interpret)
    keys, values = (tpu_prepare.slots_from_tiles(tiling, kept[name]) for name in ("summary_key", "summary_value"))
    state = (kept["tile_key"], kept["tile_value"]) if tiling.carries else None
    out, log_sum_exp = tpu_attention.attention(
        tiling,
        padded,
        bias,
        tpu_prepare.rotate_query(tiling, padded, where, shape.rope_base),
        _slot_blocks(tiling, keys),
        _slot_blocks(tiling, values),
        where.rows,
        where.slots,
        state,
        interpret,
    )
    out = tpu_prepare.unpad_chunks(tiling, tpu_prepare.unpad_heads(tiling, out))
    rows = jnp.moveaxis(tpu_prepare.from_tiles(tiling, log_sum_exp[:, :, :, 0]), 1, 2)
    by_head = (shape.num_heads, shape.head_dim)
    residuals = RatResiduals(
        out=out,
        log_sum_exp=jnp.moveaxis(tpu_prepare.unpad_chunks(tiling, rows), 2, 1),
        summary_key=tpu_prepare.unpad_heads(tiling, keys).reshape(
            tiling.shape.batch, tiling.shape.num_chunks, *by_head
        ),
        summary_value=tpu_prepare.unpad_heads(tiling, values).reshape(
            tiling.shape.batch, tiling.shape.num_chunks, *by_head
        ),
        tile_key=kept["tile_key"][:, :, 0] if tiling.carries else None,
        tile_value=kept["tile_value"][:, :, 0] if tiling.carries else None,
    )
    return out, residuals


@functools.partial(jax.jit, static_argnames=("shape", "interpret", "tiles"))
def rat_backward(
    shape: RatShape,
    residuals: RatResiduals,
    projected: jax.Array,
    gate_bias: jax.Array,
    d_out: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    interpret: Interpret = False,
    tiles: Tiles | None = None,
    beyond: Beyond | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of `projected` (in its shape and dtype) and `gate_bias` (float32 [D]) from that of `out`, [B, T, D].

    Arguments are those of `rat_forward`, which gave `residuals`; what `residuals` holds is not recomputed, the running
    pairs are. Of a part of a row `residuals` have the output and log-sum-exp of all parts, and `beyond` what else it
    needs, with gradients of keys before their rotation.
    """
    tiling = Tiling.of(shape, tiles)
    padded = tpu_prepare.pad_chunks(tiling, tpu_prepare.pad_heads(tiling, projected))
    bias = tpu_prepare.pad_heads(tiling, gate_bias.astype(jnp.float32))[None]
    where = tpu_prepare.places(tiling, positions, segment_ids)
    query = tpu_prepare.rotate_query(tiling, padded, where, shape.rope_base)
    keys, values = (
        _slot_blocks(tiling, tpu_prepare.pad_heads(tiling, x.reshape(tiling.shape.batch, tiling.shape.num_chunks, -1)))
        for x in (residuals.summary_key, residuals.summary_value)
    )
    d_out = d_out.astype(tiling.dtype)
    sums = _sums(tiling, residuals, d_out)
    d_out, out = (tpu_prepare.pad_chunks(tiling, tpu_prepare.pad_heads(tiling, x)) for x in (d_out, residuals.out))
    unused = tiling.slot_blocks * tiling.slot_block - tiling.shape.num_chunks
    cos, sin = tpu_prepare.rotations(
        tiling, jnp.pad(where.slot_chunks[:, : tiling.shape.num_chunks], ((0, 0), (0, unused))), shape.rope_base
    )
    d_slots = tpu_gradients.slot_gradients(
        tiling, padded, query, keys, values, d_out, sums, cos, sin, where.rows, where.slots, interpret
    )
    if beyond is not None:
        more = (
            _slot_blocks(tiling, tpu_prepare.pad_heads(tiling, x.reshape(*x.shape[:2], -1)))
            for x in (beyond.d_summary_keys, beyond.d_summary_values)
        )
        d_slots = tuple(own + x for own, x in zip(d_slots, more, strict=True))
    state = (residuals.tile_key[:, :, None], residuals.tile_value[:, :, None]) if tiling.carries else None
    grads = tpu_gradients.token_gradients(
        tiling,
        padded,
        bias,
        query,
        keys,
        values,
        out,
        d_out,
        sums,
        tuple(tpu_prepare.slots_to_tiles(tiling, x) for x in d_slots),
        where.rows,
        where.slots,
        where.slot_ends,
        state,
        interpret,
    )
    d_query = tpu_prepare.rotate_back_query(tiling, grads["d_rotated_query"], where, shape.rope_base) + grads["d_query"]
    parts = (grads["d_output_gate"], grads["d_value"], grads["d_gate"], d_query, grads["d_key"])
    d_padded = jnp.concatenate([part.astype(tiling.dtype) for part in parts], axis=2)
    d_projected = tpu_prepare.unpad_heads(tiling, tpu_prepare.unpad_chunks(tiling, d_padded))
    return d_projected, tpu_prepare.unpad_heads(tiling, jnp.sum(grads["d_bias"], axis=(0, 1, 2)))


def _sums(tiling: Tiling, residuals: RatResiduals, d_out: jax.Array) -> jax.Array:
    """Log-sum-exp and delta_t = sum(d_out out) of every token and head: float32 [B, N, tiles, 2, tile]."""
    product = d_out.astype(jnp.float32) * residuals.out.astype(jnp.float32)
    delta = jnp.sum(
        product.reshape(tiling.shape.batch, tiling.shape.tokens, tiling.shape.num_heads, tiling.shape.head_dim), axis=3
    )
    sums = jnp.stack([jnp.moveaxis(residuals.log_sum_exp, 1, 2), delta], axis=3)
    return jnp.moveaxis(tpu_prepare.to_tiles(tiling, jnp.moveaxis(tpu_prepare.pad_chunks(tiling, sums), 1, 3)), 2, 3)


def _slot_blocks(tiling: Tiling, x: jax.Array) -> jax.Array:
    """[B, slots, N lanes] -> [B, slot blocks * slot_block, N lanes], zeros past the last slot."""
    return jnp.pad(x, ((0, 0), (0, tiling.slot_blocks * tiling.slot_block - tiling.shape.num_chunks), (0, 0)))
