"""Attention of one query a row to the keys of a cache, each of which is read once: what bounds a step's time.

The equations are those of `rat_jax.ops.attention.attention`. A program serves the query heads of one key head. With few
rows each has several programs, which split its keys; `attention_decode_join` then joins them. Slots in front of the
first key that a query sees, and behind the last, are not read.
"""

import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.attention import triton_decode_tiling as tiling
from pallas_kernels.attention.shape import AttentionShape
from pallas_kernels.launch import triton as launcher
from pallas_kernels.launch.sizes import LOG2_E, SEES_NOTHING, next_power_of_2
from pallas_kernels.launch.triton import Launch

_NOTHING = SEES_NOTHING * LOG2_E  # the largest score of no keys


@triton.jit(do_not_specialize=["num_keys"])
def attention_decode(
    query,  # [B, 1, N, H]
    keys,  # [B, S, K, H]
    values,  # [B, S, K, H]
    query_segments,  # [B, 1] int32
    query_index,  # [B, 1] int32
    key_segments,  # [B, S] int32
    key_index,  # [B, S] int32
    begins,  # [B] int32: the first slot that a row's query sees
    ends,  # [B] int32: the first one behind the last that it sees
    num_keys,  # S
    split_values,  # [B, N, SPLITS, H] float32: sums of values, weighted by exp2 of scores less their maximum
    split_maxima,  # [B, N, SPLITS] float32: of scores times log2 e; very negative where nothing is seen
    split_weights,  # [B, N, SPLITS] float32: sums of the weights
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    WINDOW: tl.constexpr,  # -1: none
    SCORE_SCALE: tl.constexpr,  # log2 e included
    NOTHING: tl.constexpr,
    SPLITS: tl.constexpr,
    KEYS: tl.constexpr,  # at once
    HEADS_PADDED: tl.constexpr,  # N / K, at least 16 for the matrix units
    H_PADDED: tl.constexpr,
):
    """One program reduces one part of one row's keys, for the query heads of one key head."""
    HEADS: tl.constexpr = N // K
    kv = tl.program_id(0) % K
    split = tl.program_id(0) // K
    row = tl.program_id(1).to(tl.int64)
    head, channel = tl.arange(0, HEADS_PADDED), tl.arange(0, H_PADDED)
    own = (head < HEADS)[:, None] & (channel < H)[None, :]
    n = kv * HEADS + head
    q = tl.load(query + (row * N + n)[:, None] * H + channel[None, :], mask=own, other=0.0)
    segment, index = tl.load(query_segments + row), tl.load(query_index + row)
    begin, end = tl.load(begins + row), tl.load(ends + row)
    tiles = tl.cdiv(tl.cdiv(end - begin, SPLITS), KEYS)
    maximum = tl.full([HEADS_PADDED], NOTHING, tl.float32)
    weight = tl.zeros([HEADS_PADDED], tl.float32)
    y = tl.zeros([HEADS_PADDED, H_PADDED], tl.float32)
    for step in range(tiles):
        slot = begin + (split * tiles + step) * KEYS + tl.arange(0, KEYS)
        inside = slot < end
        at = ((row * num_keys + slot) * K + kv)[:, None] * H + channel[None, :]
        # Not by what is seen, which would have to be read before: keys beside those that are seen cost little.
        key = tl.load(keys + at, mask=inside[:, None] & (channel < H)[None, :], other=0.0)
        held = tl.load(key_segments + row * num_keys + slot, mask=inside, other=0)
        distance = index - tl.load(key_index + row * num_keys + slot, mask=inside, other=0)
        visible = (held == segment) & (held != 0) & (distance >= 0)
        if WINDOW >= 0:
            visible = visible & (distance <= WINDOW)
        scores = tl.dot(q, tl.trans(key), input_precision="ieee") * SCORE_SCALE
        scores = tl.where(visible[None, :], scores, -float("inf"))
        largest = tl.maximum(maximum, tl.max(scores, axis=1))
        shrink = tl.exp2(maximum - largest)
        p = tl.exp2(scores - largest[:, None])
        maximum = largest
        weight = weight * shrink + tl.sum(p, axis=1)
        value = tl.load(values + at, mask=visible[:, None] & (channel < H)[None, :], other=0.0)
        y = y * shrink[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
    part = (row * N + n) * SPLITS + split
    tl.store(split_values + part[:, None] * H + channel[None, :], y, mask=own)
    tl.store(split_maxima + part, maximum, mask=head < HEADS)
    tl.store(split_weights + part, weight, mask=head < HEADS)


@triton.jit
def attention_decode_join(
    split_values,  # from `attention_decode`
    split_maxima,
    split_weights,
    out,  # [B, 1, N, H]
    log_sum_exp,  # [B, 1, N] float32
    N: tl.constexpr,
    H: tl.constexpr,
    LOG2_E: tl.constexpr,
    NOTHING: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    H_PADDED: tl.constexpr,
):
    """One program joins the parts of one row's keys, for one query head."""
    at = tl.program_id(1).to(tl.int64) * N + tl.program_id(0)
    split, channel = tl.arange(0, SPLITS_PADDED), tl.arange(0, H_PADDED)
    maxima = tl.load(split_maxima + at * SPLITS + split, mask=split < SPLITS, other=NOTHING)
    weights = tl.load(split_weights + at * SPLITS + split, mask=split < SPLITS, other=0.0)
    own = (split < SPLITS)[:, None] & (channel < H)[None, :]
    parts = tl.load(split_values + (at * SPLITS + split)[:, None] * H + channel[None, :], mask=own, other=0.0)
    largest = tl.max(maxima)
    shrink = tl.exp2(maxima - largest)
    weight = tl.sum(weights * shrink)
    weight = tl.where(weight == 0.0, 1.0, weight)  # a query that sees nothing reads zero
    y = tl.sum(parts * shrink[:, None], axis=0) / weight
    tl.store(out + at * H + channel, y.to(out.dtype.element_ty), mask=channel < H)
    tl.store(log_sum_exp + at, (largest + tl.log2(weight)) / LOG2_E)


def attend(
    shape: AttentionShape,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_info: tuple[jax.Array, jax.Array],
    key_info: tuple[jax.Array, jax.Array],
    visible: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Out [B, 1, N, H], and the log-sum-exp of the scaled scores [B, 1, N] in float32.

    Args:
      shape: sizes for which `triton_decode_tiling.unsupported_reason` has no reason.
      query: [B, 1, N, H].
      key, value: [B, S, K, H], of the dtype of `query`.
      query_info: segments and indices in the row, [B, 1] int32 each.
      key_info: the same of the keys, [B, S].
      visible: [B, S] bool, the keys that each row's query sees by both and the window.
    """
    return attend_by(launcher.run, shape, query, key, value, *query_info, *key_info, *seen_slots(visible))


def seen_slots(visible: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first slot that each row's query sees and the first one behind the last, both 0 where it sees none.

    Layers of a model with the same room get the same numbers, which XLA finds out and makes once.
    """
    slots = jnp.arange(visible.shape[1], dtype=jnp.int32)
    ends = jnp.max(jnp.where(visible, slots + 1, 0), axis=1)
    return jnp.minimum(jnp.min(jnp.where(visible, slots, visible.shape[1]), axis=1), ends), ends


def attend_by(run: launcher.Run, shape: AttentionShape, query, key, value, *places):
    """As `attend`, through `run`, on the arrays of whatever library it runs kernels with.

    Args:
      run: runs a launch.
      shape: as of `attend`.
      query, key, value: as of `attend`.
      *places: segments and indices of queries and of keys, and `seen_slots`.
    """
    num_keys = key.shape[1]
    parts = run(decode_launch(shape, num_keys), query, key, value, *places)
    return run(join_launch(shape, num_keys), *parts)


def decode_launch(shape: AttentionShape, num_keys: int) -> Launch:
    """`attention_decode` for these sizes."""
    splits, tile = tiling.splits(shape, num_keys), tiling.tile(shape)
    part = (shape.batch, shape.num_heads, splits)
    return Launch(
        kernel=attention_decode,
        grid=(shape.key_heads * splits, shape.batch),
        integers=(num_keys,),
        outputs=(((*part, shape.head_dim), "float32"), (part, "float32"), (part, "float32")),
        constants=(
            ("N", shape.num_heads),
            ("K", shape.key_heads),
            ("H", shape.head_dim),
            ("WINDOW", -1 if shape.window is None else shape.window),
            ("SCORE_SCALE", LOG2_E / math.sqrt(shape.head_dim)),
            ("NOTHING", _NOTHING),
            ("SPLITS", splits),
            ("KEYS", tile.keys),
            ("HEADS_PADDED", tile.heads),
            ("H_PADDED", tile.channels),
        ),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def join_launch(shape: AttentionShape, num_keys: int) -> Launch:
    """`attention_decode_join` for these sizes."""
    splits = tiling.splits(shape, num_keys)
    return Launch(
        kernel=attention_decode_join,
        grid=(shape.num_heads, shape.batch),
        integers=(),
        outputs=(
            ((shape.batch, 1, shape.num_heads, shape.head_dim), shape.dtype),
            ((shape.batch, 1, shape.num_heads), "float32"),
        ),
        constants=(
            ("N", shape.num_heads),
            ("H", shape.head_dim),
            ("LOG2_E", LOG2_E),
            ("NOTHING", _NOTHING),
            ("SPLITS", splits),
            ("SPLITS_PADDED", next_power_of_2(splits)),
            ("H_PADDED", tiling.tile(shape).channels),
        ),
        num_warps=tiling.join_warps(shape, num_keys),
        num_stages=1,
    )
