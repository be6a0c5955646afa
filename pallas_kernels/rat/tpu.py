"""The RAT mixing op on TPU (arXiv 2507.04416): entry points on plain arrays of one device."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.launch.tpu import LANES, Interpret
from pallas_kernels.rat import tpu_attention, tpu_gradients, tpu_prepare, tpu_recurrence
from pallas_kernels.rat.tpu_tiling import Plan, Tiles, make_plan

FORWARD_KERNELS = (tpu_recurrence.NAME, tpu_attention.NAME)
BACKWARD_KERNELS = (tpu_gradients.SLOTS_NAME, tpu_gradients.TOKENS_NAME)
MAX_HEAD_DIM = 512


class RatResiduals(NamedTuple):
    """What the backward pass and a decoding cache keep of a forward pass. C = ceil(T / L)."""

    out: jax.Array  # [B, T, D]
    log_sum_exp: jax.Array  # float32 [B, N, T], own score included
    summary_key: jax.Array  # [B, C, N, H], rotated; zero where the array block completes no chunk
    summary_value: jax.Array  # [B, C, N, H]
    final_key: jax.Array  # float32 [B, N, H]: running k~ of the row's last token, not rotated
    final_value: jax.Array  # float32 [B, N, H]
    tile_key: jax.Array | None  # float32 [B, tiles, D padded]: running k~ before every tile, if state crosses tiles
    tile_value: jax.Array | None


@functools.partial(jax.jit, static_argnames=("num_groups", "chunk_size", "rope_base", "interpret", "tiles"))
def rat_forward(
    projected: jax.Array,
    gate_bias: jax.Array,
    *,
    num_groups: int,
    chunk_size: int,
    rope_base: float | None,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    interpret: Interpret = False,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, RatResiduals]:
    """out_t = sigmoid(z_t) softmax([q_t . k~_c / sqrt(H) of earlier chunks c, q_t . k~_t / sqrt(H)]) [v~_c, v~_t].

    With f = sigmoid(g + gate_bias) in float32, k~ and v~ run as x~_t = f_t x~_{t-1} + (1 - f_t) x_t from zero at every
    chunk's start; keys and queries of different chunks are rotated by their chunk's index.

    Args:
      projected: [B, T, 3 D + 2 G H] bfloat16 or float32: z, v, g (D each), q, k (G H each).
      gate_bias: float32 [D].
      rope_base: base of the rotation of channel pairs (i, i + H/2) by chunk index; None leaves it out.
      positions: int32 [B, T], position in the document; with `segment_ids` or not at all.
      segment_ids: int32 [B, T]; 0 is padding, which leaves the state as it is; a token at position 0 starts a document.
      interpret: run without a TPU, as `pallas_call` means it.
      tiles: block sizes; None is `plan.default_tiles`.

    Returns:
      out [B, T, D] in the dtype of `projected`, and the residuals.

    Raises:
      ValueError: with the text of `refusal`, if the kernels do not take these shapes.
    """
    plan = _plan(projected, gate_bias, num_groups, chunk_size, rope_base, positions, segment_ids, tiles)
    padded = tpu_prepare.pad_chunks(plan, tpu_prepare.pad_heads(plan, projected))
    bias = tpu_prepare.pad_heads(plan, gate_bias.astype(jnp.float32))[None]
    where = tpu_prepare.places(plan, positions, segment_ids)
    cos, sin = tpu_prepare.rotations(plan, where.slot_chunks, rope_base)
    cos, sin = (table.reshape(len(table), -1, plan.slots_per_tile, plan.lanes) for table in (cos, sin))
    kept = tpu_recurrence.summaries(plan, padded, bias, cos, sin, where.rows, where.slot_ends, interpret)
    keys, values = (tpu_prepare.slots_from_tiles(plan, kept[name]) for name in ("summary_key", "summary_value"))
    state = (kept["tile_key"], kept["tile_value"]) if plan.carries else None
    out, log_sum_exp = tpu_attention.attention(
        plan,
        padded,
        bias,
        tpu_prepare.rotate_query(plan, padded, where, rope_base),
        _slot_blocks(plan, keys),
        _slot_blocks(plan, values),
        where.rows,
        where.slots,
        state,
        interpret,
    )
    out = tpu_prepare.unpad_chunks(plan, tpu_prepare.unpad_heads(plan, out))
    rows = jnp.moveaxis(tpu_prepare.from_tiles(plan, log_sum_exp[:, :, :, 0]), 1, 2)
    by_head = (plan.heads, plan.head_dim)
    residuals = RatResiduals(
        out=out,
        log_sum_exp=jnp.moveaxis(tpu_prepare.unpad_chunks(plan, rows), 2, 1),
        summary_key=tpu_prepare.unpad_heads(plan, keys).reshape(plan.batch, plan.slots, *by_head),
        summary_value=tpu_prepare.unpad_heads(plan, values).reshape(plan.batch, plan.slots, *by_head),
        final_key=tpu_prepare.unpad_heads(plan, kept["final_key"]).reshape(plan.batch, *by_head),
        final_value=tpu_prepare.unpad_heads(plan, kept["final_value"]).reshape(plan.batch, *by_head),
        tile_key=kept["tile_key"][:, :, 0] if plan.carries else None,
        tile_value=kept["tile_value"][:, :, 0] if plan.carries else None,
    )
    return out, residuals


@functools.partial(jax.jit, static_argnames=("num_groups", "chunk_size", "rope_base", "interpret", "tiles"))
def rat_backward(
    residuals: RatResiduals,
    projected: jax.Array,
    gate_bias: jax.Array,
    d_out: jax.Array,
    *,
    num_groups: int,
    chunk_size: int,
    rope_base: float | None,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    interpret: Interpret = False,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of `projected` (in its shape and dtype) and `gate_bias` (float32 [D]) from that of `out`, [B, T, D].

    Arguments are those of `rat_forward`, which gave `residuals`; what `residuals` holds is not recomputed, the running
    pairs are.
    """
    plan = _plan(projected, gate_bias, num_groups, chunk_size, rope_base, positions, segment_ids, tiles)
    padded = tpu_prepare.pad_chunks(plan, tpu_prepare.pad_heads(plan, projected))
    bias = tpu_prepare.pad_heads(plan, gate_bias.astype(jnp.float32))[None]
    where = tpu_prepare.places(plan, positions, segment_ids)
    query = tpu_prepare.rotate_query(plan, padded, where, rope_base)
    keys, values = (
        _slot_blocks(plan, tpu_prepare.pad_heads(plan, x.reshape(plan.batch, plan.slots, -1)))
        for x in (residuals.summary_key, residuals.summary_value)
    )
    d_out = d_out.astype(plan.dtype)
    sums = _sums(plan, residuals, d_out)
    d_out, out = (tpu_prepare.pad_chunks(plan, tpu_prepare.pad_heads(plan, x)) for x in (d_out, residuals.out))
    unused = plan.slot_blocks * plan.slot_block - plan.slots
    cos, sin = tpu_prepare.rotations(
        plan, jnp.pad(where.slot_chunks[:, : plan.slots], ((0, 0), (0, unused))), rope_base
    )
    d_slots = tpu_gradients.slot_gradients(
        plan, padded, query, keys, values, d_out, sums, cos, sin, where.rows, where.slots, interpret
    )
    state = (residuals.tile_key[:, :, None], residuals.tile_value[:, :, None]) if plan.carries else None
    grads = tpu_gradients.token_gradients(
        plan,
        padded,
        bias,
        query,
        keys,
        values,
        out,
        d_out,
        sums,
        tuple(tpu_prepare.slots_to_tiles(plan, x) for x in d_slots),
        where.rows,
        where.slots,
        where.slot_ends,
        state,
        interpret,
    )
    d_query = tpu_prepare.rotate_back_query(plan, grads["d_rotated_query"], where, rope_base) + grads["d_query"]
    parts = (grads["d_output_gate"], grads["d_value"], grads["d_gate"], d_query, grads["d_key"])
    d_padded = jnp.concatenate([part.astype(plan.dtype) for part in parts], axis=2)
    d_projected = tpu_prepare.unpad_heads(plan, tpu_prepare.unpad_chunks(plan, d_padded))
    return d_projected, tpu_prepare.unpad_heads(plan, jnp.sum(grads["d_bias"], axis=(0, 1, 2)))


def refusal(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *, width: int, num_groups: int, rope_base: float | None
) -> str | None:
    """Why `projected` of this shape and dtype cannot run here and the nearest that can; None if it can.

    Any T >= 1 and any chunk size run; heads are padded to a multiple of 128 channels.
    """
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        return f"the TPU kernels take bfloat16 or float32, got {jnp.dtype(dtype)}"
    if len(shape) != 3 or shape[0] < 1 or shape[1] < 1:
        return f"projected must be [B, T, 3 D + 2 G H] with B, T >= 1, got shape {shape}"
    head_dim, left = divmod(shape[2] - 3 * width, 2 * num_groups)
    if head_dim < 1 or left or width % head_dim:
        return (
            f"{shape[2]} channels are not 3 D + 2 G H with D = {width}, G = {num_groups} and an H that divides D; "
            f"nearest with H = {LANES}: {3 * width + 2 * num_groups * LANES} channels"
        )
    heads = width // head_dim
    if heads % num_groups:
        below = heads - heads % num_groups
        nearest = f"{below} or {below + num_groups}" if below else f"{num_groups}"
        return (
            f"the TPU kernels take whole groups of heads: {heads} heads, {num_groups} groups; nearest: {nearest} heads"
        )
    if head_dim > MAX_HEAD_DIM:
        return f"the TPU kernels take heads of at most {MAX_HEAD_DIM} channels, got {head_dim}; nearest: {MAX_HEAD_DIM}"
    if rope_base is not None and head_dim % 2:
        return f"rotation needs an even head size, got {head_dim}; nearest: {head_dim + 1}"
    return None


def _plan(projected, gate_bias, num_groups, chunk_size, rope_base, positions, segment_ids, tiles) -> Plan:
    (width,) = gate_bias.shape
    reason = refusal(projected.shape, projected.dtype, width=width, num_groups=num_groups, rope_base=rope_base)
    if reason is not None:
        raise ValueError(reason)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be 1 or more, got {chunk_size}")
    if (positions is None) != (segment_ids is None):
        raise ValueError("positions and segment_ids describe packed rows together: pass both or neither")
    batch, tokens, channels = projected.shape
    return make_plan(
        batch=batch,
        tokens=tokens,
        width=width,
        head_dim=(channels - 3 * width) // (2 * num_groups),
        groups=num_groups,
        chunk=chunk_size,
        dtype=projected.dtype,
        segmented=segment_ids is not None,
        tiles=tiles,
    )


def _sums(plan: Plan, residuals: RatResiduals, d_out: jax.Array) -> jax.Array:
    """Log-sum-exp and delta_t = sum(d_out out) of every token and head: float32 [B, N, tiles, 2, tile]."""
    product = d_out.astype(jnp.float32) * residuals.out.astype(jnp.float32)
    delta = jnp.sum(product.reshape(plan.batch, plan.tokens, plan.heads, plan.head_dim), axis=3)
    sums = jnp.stack([jnp.moveaxis(residuals.log_sum_exp, 1, 2), delta], axis=3)
    return jnp.moveaxis(tpu_prepare.to_tiles(plan, jnp.moveaxis(tpu_prepare.pad_chunks(plan, sums), 1, 3)), 2, 3)


def _slot_blocks(plan: Plan, x: jax.Array) -> jax.Array:
    """[B, slots, N lanes] -> [B, slot blocks * slot_block, N lanes], zeros past the last slot."""
    return jnp.pad(x, ((0, 0), (0, plan.slot_blocks * plan.slot_block - plan.slots), (0, 0)))
