"""One new token a row: the running states, the summaries and the output in one kernel, in place.

The equations are those of `rat`, for a token at position t of its document, t = c L + j: the states restart if j = 0,
the token attends to its document's c summaries and to the current pair, and if j = L - 1 its states become the next of
them. Every summary of the document is read once, which bounds the time. With few rows, `rat_decode_attend` first splits
a row's summaries over programs.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.launch import triton as launcher
from pallas_kernels.launch.sizes import cdiv, next_power_of_2
from pallas_kernels.launch.triton import Launch
from pallas_kernels.rat.shape import RatShape
from pallas_kernels.rat.state import State
from pallas_kernels.rat.triton_recurrence import gates, load_halves
from pallas_kernels.rat.triton_rotation import rotation

ENOUGH_PROGRAMS = 1024  # fewer rows times heads are split
# Summaries that a program loads at once, and its warps: where rows are split, and where a program reads all of a row's.
# Many programs keep more bytes on their way if each is small (docs/lab_notes.md).
SPLIT_KEYS, SPLIT_WARPS = 32, 2
WHOLE_KEYS, WHOLE_WARPS = 16, 1


@triton.jit(do_not_specialize=["capacity"])
def rat_decode_attend(
    projected,
    cosines,
    sines,
    positions,
    first_slots,
    summary_keys,
    summary_values,
    capacity,
    split_values,  # [B, N, SPLITS, H] float32: weighted sums of values
    split_maxima,  # [B, N, SPLITS] float32
    split_weights,  # [B, N, SPLITS] float32
    L: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    ROPE: tl.constexpr,
    SCORE_SCALE: tl.constexpr,
    SPLITS: tl.constexpr,
    KEYS: tl.constexpr,  # summaries at once
    HALF_PADDED: tl.constexpr,
):
    """One program reduces one part of one row's summaries, for one head."""
    HALF: tl.constexpr = (H + 1) // 2
    split = tl.program_id(0) % SPLITS
    n = tl.program_id(0) // SPLITS
    row = tl.program_id(1).to(tl.int64)
    half = tl.arange(0, HALF_PADDED)
    begin, end = _slots_of_document(positions, first_slots, row, capacity, L)
    q_low, q_high = _query(projected, cosines, sines, row, n, half, N, G, H, ROPE, SCORE_SCALE)
    size = tl.cdiv(tl.cdiv(end - begin, SPLITS), KEYS) * KEYS
    begin += split * size
    maximum = tl.sum(q_low * 0.0) - 1e30
    weight = maximum * 0.0
    low, high = q_low * 0.0, q_low * 0.0
    maximum, weight, low, high = _reduce(
        summary_keys, summary_values, row, n, capacity, begin, tl.minimum(begin + size, end), half,
        q_low, q_high, maximum, weight, low, high, N, H, KEYS,
    )  # fmt: skip
    at = (row * N + n) * SPLITS + split
    tl.store(split_values + at * H + half, low, mask=half < HALF)
    tl.store(split_values + at * H + HALF + half, high, mask=HALF + half < H)
    tl.store(split_maxima + at, maximum)
    tl.store(split_weights + at, weight)


@triton.jit(do_not_specialize=["capacity"])
def rat_decode_step(
    projected,  # [B, 1, 3 D + 2 G H]
    gate_bias,  # [D] float32
    cosines,  # [B, H / 2] float32: of the rotation by the token's chunk index
    sines,
    positions,  # [B] int32: tokens of the document before this one
    first_slots,  # [B] int32: of the first chunk of the token's document; slots from the capacity on are not kept
    is_token,  # [B] int32: 0 leaves the row as it is and gives zero
    split_values,  # from `rat_decode_attend`; read only if SPLITS is above 1
    split_maxima,
    split_weights,
    state_keys,  # [B, N, H] float32, overwritten
    state_values,  # [B, N, H] float32, overwritten
    summary_keys,  # [B, C, N, H], overwritten
    summary_values,  # [B, C, N, H], overwritten
    capacity,  # C
    out,  # [B, 1, D]
    state_keys_alias,
    state_values_alias,
    summary_keys_alias,
    summary_values_alias,
    L: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    ROPE: tl.constexpr,
    SCORE_SCALE: tl.constexpr,
    SPLITS: tl.constexpr,
    KEYS: tl.constexpr,  # summaries at once
    HALF_PADDED: tl.constexpr,
):
    """One program serves one head of one row."""
    D: tl.constexpr = N * H
    HALF: tl.constexpr = (H + 1) // 2
    n = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    half = tl.arange(0, HALF_PADDED)
    low, high = half < HALF, HALF + half < H
    position = tl.load(positions + row)
    use = tl.load(is_token + row) != 0
    begin, end = _slots_of_document(positions, first_slots, row, capacity, L)
    at = projected + row * (3 * D + 2 * G * H) + n * H + half
    state_at = row * D + n * H + half
    z_low, z_high = _vector(at, low, high, HALF)
    q_low, q_high = _vector(at + 3 * D + (n % G - n) * H, low, high, HALF)
    k_low, k_high, v_low, v_high = _new_states(
        at, gate_bias, state_keys + state_at, state_values + state_at, n, half, low, high, position % L != 0, D, G, H
    )
    tl.debug_barrier()
    maximum = tl.sum(q_low * k_low + q_high * k_high) * SCORE_SCALE
    weight = maximum * 0.0 + 1.0
    if ROPE:
        cos, sin = _angles(cosines, sines, row, half, HALF)
        q_low, q_high = q_low * cos - q_high * sin, q_high * cos + q_low * sin
    q_low, q_high = q_low * SCORE_SCALE, q_high * SCORE_SCALE
    if SPLITS == 1:
        maximum, weight, y_low, y_high = _reduce(
            summary_keys, summary_values, row, n, capacity, begin, tl.where(use, end, begin), half,
            q_low, q_high, maximum, weight, v_low, v_high, N, H, KEYS,
        )  # fmt: skip
    else:
        y_low, y_high = v_low, v_high
        for split in range(SPLITS):
            part = (row * N + n) * SPLITS + split
            other = tl.load(split_maxima + part)
            largest = tl.maximum(maximum, other)
            shrink, grow = tl.exp2(maximum - largest), tl.exp2(other - largest)
            maximum = largest
            weight = weight * shrink + tl.load(split_weights + part) * grow
            part_low, part_high = _vector(split_values + part * H + half, low, high, HALF)
            y_low = y_low * shrink + part_low * grow
            y_high = y_high * shrink + part_high * grow
    y_low = tl.where(use, y_low / weight * tl.sigmoid(z_low), 0.0)
    y_high = tl.where(use, y_high / weight * tl.sigmoid(z_high), 0.0)
    _store_vector(out + state_at, y_low, y_high, low, high, HALF)
    low, high = low & use, high & use
    _store_vector(state_keys + state_at, k_low, k_high, low, high, HALF)
    _store_vector(state_values + state_at, v_low, v_high, low, high, HALF)
    slot = tl.load(first_slots + row) + position // L
    if (position % L == L - 1) & (slot < capacity):
        if ROPE:
            k_low, k_high = k_low * cos - k_high * sin, k_high * cos + k_low * sin
        to = (row * capacity + slot) * D + n * H + half
        _store_vector(summary_keys + to, k_low, k_high, low, high, HALF)
        _store_vector(summary_values + to, v_low, v_high, low, high, HALF)


@triton.jit
def _slots_of_document(positions, first_slots, row, capacity, L: tl.constexpr):
    """The summaries of the token's document: position // L of them, as far as they were kept."""
    begin = tl.load(first_slots + row)
    return tl.minimum(begin, capacity), tl.minimum(begin + tl.load(positions + row) // L, capacity)


@triton.jit
def _new_states(
    at, gate_bias, keys_at, values_at, n, half, low, high, keep,
    D: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """The running key and value after the token, as halves."""
    HALF: tl.constexpr = (H + 1) // 2
    bias_low, bias_high = _vector(gate_bias + n * H + half, low, high, HALF)
    gate_low, gate_high = _vector(at + 2 * D, low, high, HALF)
    f_low, w_low = gates(gate_low + bias_low, low, False)
    f_high, w_high = gates(gate_high + bias_high, high, False)
    new_v_low, new_v_high = _vector(at + D, low, high, HALF)
    new_k_low, new_k_high = _vector(at + 3 * D + (G + n % G - n) * H, low, high, HALF)
    k_low, k_high = _vector(keys_at, low & keep, high & keep, HALF)
    v_low, v_high = _vector(values_at, low & keep, high & keep, HALF)
    return (
        f_low * k_low + w_low * new_k_low,
        f_high * k_high + w_high * new_k_high,
        f_low * v_low + w_low * new_v_low,
        f_high * v_high + w_high * new_v_high,
    )


@triton.jit
def _query(
    projected, cosines, sines, row, n, half,
    N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, ROPE: tl.constexpr, SCORE_SCALE: tl.constexpr,
):  # fmt: skip
    """The query of one head, rotated and scaled, as halves."""
    HALF: tl.constexpr = (H + 1) // 2
    at = projected + row * (3 * N * H + 2 * G * H) + 3 * N * H + n % G * H + half
    q_low, q_high = _vector(at, half < HALF, HALF + half < H, HALF)
    if ROPE:
        cos, sin = _angles(cosines, sines, row, half, HALF)
        q_low, q_high = q_low * cos - q_high * sin, q_high * cos + q_low * sin
    return q_low * SCORE_SCALE, q_high * SCORE_SCALE


@triton.jit
def _angles(cosines, sines, row, half, HALF: tl.constexpr):
    at = row * HALF + half
    return tl.load(cosines + at, mask=half < HALF, other=1.0), tl.load(sines + at, mask=half < HALF, other=0.0)


@triton.jit
def _reduce(
    summary_keys, summary_values, row, n, capacity, begin, end, half, q_low, q_high, maximum, weight, y_low, y_high,
    N: tl.constexpr, H: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Summaries begin .. end join an online softmax of one query."""
    HALF: tl.constexpr = (H + 1) // 2
    low, high = (half < HALF)[None, :], (HALF + half < H)[None, :]
    for first in range(begin, end, KEYS):
        slot = first + tl.arange(0, KEYS)
        valid = slot < end
        at = ((row * capacity + slot) * (N * H))[:, None] + n * H + half[None, :]
        key = load_halves(summary_keys + at, valid, low, high, HALF)
        value = load_halves(summary_values + at, valid, low, high, HALF)
        scores = tl.sum(key[0].to(tl.float32) * q_low[None, :] + key[1].to(tl.float32) * q_high[None, :], axis=1)
        scores = tl.where(valid, scores, -float("inf"))
        largest = tl.maximum(maximum, tl.max(scores))
        shrink = tl.exp2(maximum - largest)
        p = tl.exp2(scores - largest)
        maximum = largest
        weight = weight * shrink + tl.sum(p)
        y_low = y_low * shrink + tl.sum(p[:, None] * value[0].to(tl.float32), axis=0)
        y_high = y_high * shrink + tl.sum(p[:, None] * value[1].to(tl.float32), axis=0)
    return maximum, weight, y_low, y_high


@triton.jit
def _vector(at, low, high, HALF: tl.constexpr):
    """The two halves of a head's channels, in float32."""
    return (
        tl.load(at, mask=low, other=0.0).to(tl.float32),
        tl.load(at + HALF, mask=high, other=0.0).to(tl.float32),
    )


@triton.jit
def _store_vector(at, x_low, x_high, low, high, HALF: tl.constexpr):
    tl.store(at, x_low.to(at.dtype.element_ty), mask=low)
    tl.store(at + HALF, x_high.to(at.dtype.element_ty), mask=high)


def rat_decode(
    shape: RatShape,
    projected: jax.Array,
    gate_bias: jax.Array,
    state: State,
    segment_ids: jax.Array,
    positions: jax.Array,
    first_slots: jax.Array,
) -> tuple[jax.Array, State]:
    """One token of every row: out [B, 1, D], and the state with it, in place where `state` is donated.

    Args:
      shape: sizes for which `triton_tiling.unsupported_reason` has no reason, of one token a row.
      projected: [B, 1, 3 D + 2 G H], in the order of `rat`.
      gate_bias: [D] float32.
      state: of the tokens before it.
      segment_ids: [B, 1] int32; a row whose id is 0 has no token, keeps its state, and its output is zero.
      positions: [B, 1] int32, the tokens of the token's document before it.
      first_slots: [B, 1] int32, where the first chunk of the token's document has its summary.
    """
    is_token, position = segment_ids[:, 0] != 0, positions[:, 0]
    tables = rotation(position // shape.chunk_size, shape.head_dim, shape.rope_base)
    places = (x.astype(jnp.int32) for x in (position, jnp.where(is_token, first_slots[:, 0], 0), is_token))
    out, *cache = step(launcher.run, shape, projected, gate_bias.astype(jnp.float32), tables, *places, state)
    return out, State(*cache)


def step(run: launcher.Run, shape: RatShape, projected, gate_bias, tables, positions, first_slots, is_token, cache):
    """The kernels of a step through `run`, on the arrays of whatever library it runs them with."""
    capacity = cache[2].shape[1]
    splits = number_of_splits(shape, capacity)
    parts = (gate_bias,) * 3
    if splits > 1:
        parts = run(attend_launch(shape, capacity, splits), projected, *tables, positions, first_slots, *cache[2:])
    return run(
        step_launch(shape, capacity, splits),
        projected, gate_bias, *tables, positions, first_slots, is_token, *parts, *cache,
    )  # fmt: skip


def number_of_splits(shape: RatShape, capacity: int) -> int:
    """Programs that share a row's summaries."""
    return max(1, min(cdiv(ENOUGH_PROGRAMS, shape.batch * shape.num_heads), cdiv(capacity, SPLIT_KEYS)))


def attend_launch(shape: RatShape, capacity: int, splits: int) -> Launch:
    """`rat_decode_attend` for these sizes."""
    part = (shape.batch, shape.num_heads, splits)
    return Launch(
        kernel=rat_decode_attend,
        grid=(shape.num_heads * splits, shape.batch),
        integers=(capacity,),
        outputs=(((*part, shape.head_dim), "float32"), (part, "float32"), (part, "float32")),
        constants=_constants(shape, splits),
        num_warps=SPLIT_WARPS,
        num_stages=1,
    )


def step_launch(shape: RatShape, capacity: int, splits: int) -> Launch:
    """`rat_decode_step` for these sizes."""
    return Launch(
        kernel=rat_decode_step,
        grid=(shape.num_heads, shape.batch),
        integers=(capacity,),
        outputs=(((shape.batch, 1, shape.width), shape.dtype),),
        constants=_constants(shape, splits),
        num_warps=WHOLE_WARPS if splits == 1 else SPLIT_WARPS,
        num_stages=1,
        overwritten=(10, 11, 12, 13),
    )


def _constants(shape: RatShape, splits: int) -> tuple[tuple[str, int | bool | float], ...]:
    return (
        ("L", shape.chunk_size),
        ("N", shape.num_heads),
        ("G", shape.num_groups),
        ("H", shape.head_dim),
        ("ROPE", shape.rope),
        ("SCORE_SCALE", shape.score_scale),
        ("SPLITS", splits),
        ("KEYS", WHOLE_KEYS if splits == 1 else SPLIT_KEYS),
        ("HALF_PADDED", next_power_of_2(cdiv(shape.head_dim, 2))),
    )
