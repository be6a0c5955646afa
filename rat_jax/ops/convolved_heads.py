"""Convolved heads: queries, keys and values that short convolutions, silu and a length of 1 make of a projection."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.convolved_heads import triton_tiling
from pallas_kernels.convolved_heads.shape import ConvolvedHeadsShape
from rat_jax.mesh import TENSOR_AXIS, num_parts
from rat_jax.ops import context, convolved_heads_kernels, convolved_heads_xla, cut, dispatch
from rat_jax.ops.convolved_heads_types import ConvolvedHeads
from rat_jax.ops.short_convolution import columns_at, first_columns, next_inputs
from rat_jax.segments import SegmentInfo, as_segments, require_positions
from rat_jax.shapes import Array, Float, Float32, Int

ConvolvedHeadsImplementation = Literal["xla", "triton"]

_FASTEST_FIRST = ("triton",)


def convolved_heads(
    projected: Float[Array, "B T c"],  # c = N (2 Hk + Hv)
    taps: Float32[Array, "taps c"],
    segment_ids: Int[Array, "B T"] | SegmentInfo | None = None,
    *,
    num_heads: int,
    key_dim: int,
    last_inputs: Float[Array, "B earlier c"] | None = None,
    implementation: ConvolvedHeadsImplementation | None = None,
) -> ConvolvedHeads:
    """s_t = silu(sum_{i < taps} taps_{taps-1-i} x_{t-i}) over tokens of a document, as heads (arXiv 2412.06464).

    `projected` holds the queries, keys and values of all heads, in this order. Of each head keys are s / |s|, queries
    s / (sqrt(Hk) |s|) and values s, with |s|^2 = sum(s^2) + 1e-6. The last row of `taps` is that of the token itself,
    as in a depthwise `Conv1d` of PyTorch. Arithmetic is float32; results have the dtype of `projected`. What padding
    gives is finite and means nothing.

    A mesh may cut tokens and heads; of P parts of heads `projected` holds in turn the queries, keys and values of each
    part, `taps` is as without a mesh.

    Args:
      projected: bfloat16, float16 or float32.
      taps: of each channel; 1 alone leaves `projected` as it is before silu.
      segment_ids: 0 is padding, which may lie before, after and between documents but not inside one; neighbours of
        the same other value are one document. None: each row is one document.
      num_heads: N.
      key_dim: Hk.
      last_inputs: of each row the last taps - 1 tokens of earlier calls, padding not counted, the latest last, zeros
        where there were fewer; with a `SegmentInfo` that continues from them. Those of the next call come back. None:
        the tokens start their rows.
      implementation: None takes the fastest kernel of the platform that the program is lowered for where it takes the
        call, and "xla" elsewhere and for one token, which XLA joins with what surrounds it.

    Raises:
      ValueError: if shapes do not fit, or `last_inputs` come without a `SegmentInfo`.
      UnsupportedError: if a named implementation cannot run the call; the message says why and what comes nearest.
    """
    dispatch.check_implementation(implementation, ConvolvedHeadsImplementation)
    dispatch.check_floating(projected=projected, taps=taps)
    if projected.ndim != 3 or taps.ndim != 2 or taps.shape[1] != projected.shape[2]:
        raise ValueError(f"projected must be [B, T, c] and taps [taps, c], got {projected.shape} and {taps.shape}")
    batch, tokens, channels = projected.shape
    dispatch.check_whole(1, rows=batch, tokens=tokens, num_heads=num_heads, key_dim=key_dim, taps=taps.shape[0])
    of_keys = 2 * num_heads * key_dim
    if channels <= of_keys or channels % num_heads:
        raise ValueError(
            f"projected must have num_heads (2 key_dim + Hv) channels, for num_heads {num_heads} and key_dim {key_dim} "
            f"a multiple of {num_heads} above {of_keys}, got {channels}"
        )
    if last_inputs is not None and last_inputs.shape != (batch, taps.shape[0] - 1, channels):
        raise ValueError(f"last_inputs must be {(batch, taps.shape[0] - 1, channels)}, got {last_inputs.shape}")
    require_positions(last_inputs, segment_ids)
    segments = as_segments(segment_ids, (batch, tokens))
    taps = taps.astype(jnp.float32)
    if cut.is_cut():
        cut.refuse_state("last_inputs", last_inputs)
        return _of_parts(projected, taps, segments, num_heads, key_dim, implementation)
    value_dim = channels // num_heads - 2 * key_dim
    rows, dtype = dispatch.rows_of_device(batch), projected.dtype.name
    sizes = rows, tokens, num_heads, key_dim, value_dim, taps.shape[0], dtype
    shape = ConvolvedHeadsShape(*sizes, segmented=not segments.contiguous)

    order = _FASTEST_FIRST if tokens > 1 else ()
    chosen = dispatch.choose(implementation, order, batch, lambda _: triton_tiling.unsupported_reason(shape))
    if chosen == "xla":
        return convolved_heads_xla.convolve(projected, taps, segments, num_heads, key_dim, last_inputs)
    kernel = convolved_heads_kernels.Convolve(chosen, shape)
    own = dispatch.run(kernel, implementation is None, projected, taps, segments)
    if last_inputs is None:
        return ConvolvedHeads(*own, None)
    return _continued(own, projected, taps, segments, num_heads, key_dim, last_inputs.astype(projected.dtype))


def _of_parts(
    projected: Array,
    taps: Array,
    segments: SegmentInfo,
    num_heads: int,
    key_dim: int,
    implementation: ConvolvedHeadsImplementation | None,
) -> ConvolvedHeads:
    """Where the mesh in use cuts tokens or heads: each device those of its part."""
    parts = num_parts(TENSOR_AXIS)
    if num_heads % parts:
        raise ValueError(f"num_heads {num_heads} does not divide among the {parts} parts that the mesh cuts heads into")
    of_heads = jnp.split(taps, [num_heads * key_dim, 2 * num_heads * key_dim], axis=1)
    options = {"num_heads": num_heads // parts, "key_dim": key_dim}

    def of_part(projected: Array, segments: SegmentInfo, *of_heads: Array) -> tuple[Array, Array, Array]:
        taps = jnp.concatenate(of_heads, axis=1)
        own = convolved_heads(projected, taps, segments, **options, implementation=implementation)[:3]
        return own if context.num_parts() == 1 else _with_first(own, projected, taps, segments, **options)

    in_axes = ("BTN", "BT", *("_N",) * 3)
    return ConvolvedHeads(*cut.run(of_part, in_axes, ("BTN",) * 3, projected, segments, *of_heads), None)


def _with_first(
    own: tuple[Array, Array, Array], projected: Array, taps: Array, segments: SegmentInfo, num_heads: int, key_dim: int
) -> tuple[Array, ...]:
    """Results of a part of a row, of which the first tokens read the part before, too."""
    reach = taps.shape[0] - 1
    count = min(reach, projected.shape[1])
    inputs = jnp.concatenate([context.tokens_before(projected, reach), projected[:, :count]], axis=1)
    placed = jax.tree.map(lambda x: jnp.pad(x[:, :count], [(0, 0), (reach, 0)]), segments)
    placed = dataclasses.replace(placed, contiguous=False)
    first = convolved_heads_xla.convolve(inputs, taps, placed, num_heads, key_dim)[:3]
    return tuple(
        jax.lax.dynamic_update_slice_in_dim(x, y[:, reach:], 0, axis=1) for x, y in zip(own, first, strict=True)
    )


def _continued(
    own: tuple[Array, Array, Array],
    projected: Array,
    taps: Array,
    segments: SegmentInfo,
    num_heads: int,
    key_dim: int,
    last_inputs: Array,
) -> ConvolvedHeads:
    """Results of rows that start with these tokens, and what changes where earlier calls had others before them.

    That are the first taps - 1 columns from a row's first token on, each beside its neighbours: by plain XLA.
    """
    reach = last_inputs.shape[1]
    if reach == 0:
        return ConvolvedHeads(*own, last_inputs)
    places = first_columns(segments, reach)
    inputs = jnp.concatenate([last_inputs, columns_at(projected, places)], axis=1)
    placed = jax.tree.map(lambda x: jnp.pad(columns_at(x, places), [(0, 0), (reach, 0)]), segments)
    placed = dataclasses.replace(placed, contiguous=False)
    changed = convolved_heads_xla.convolve(inputs, taps, placed, num_heads, key_dim)[:3]
    put = jax.vmap(lambda x, places, y: x.at[places].set(y, mode="drop"))
    results = (put(x, places, y[:, reach:]) for x, y in zip(own, changed, strict=True))
    return ConvolvedHeads(*results, next_inputs(last_inputs, projected, segments))
