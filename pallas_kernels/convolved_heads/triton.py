"""Convolved heads by Triton kernels: forward and backward on one device, for GPUs.

`projected` [B, T, C] holds q, k, v of all heads, in this order. With K taps a channel, over tokens of one document:

    c_t = sum_{i < K} taps_{K-1-i} x_{t-i},    s = silu(c),
    query = s / sqrt(Hk (s s + e)),    key = s / sqrt(s s + e),    value = s,

with s s the sum over the channels of a head. Arithmetic is float32, and each result is rounded once.

    `convolved_heads_forward`     reads `projected` once and writes the three results
    `convolved_heads_backward`    reads `projected` and the results' gradients once, computes c, s and lengths again
                                  and writes the gradient of `projected`

A program goes through a span of a row's tokens with the tokens that a convolution sees in registers. Those around a
span are read twice. Nothing is kept for the backward pass but the inputs.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.convolved_heads.shape import ConvolvedHeadsShape
from pallas_kernels.convolved_heads.triton_backward import backward_launch
from pallas_kernels.convolved_heads.triton_forward import forward_launch
from pallas_kernels.convolved_heads.triton_tiling import Tiling
from pallas_kernels.launch import triton as launcher


def convolved_heads_forward(
    shape: ConvolvedHeadsShape, projected: jax.Array, taps: jax.Array, positions: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries and keys [B, T, N, Hk] and values [B, T, N, Hv] in the dtype of `projected`.

    Args:
      shape: sizes for which `triton_tiling.unsupported_reason` has no reason.
      projected: [B, T, N (2 Hk + Hv)], bfloat16, float16 or float32.
      taps: [K, N (2 Hk + Hv)] float32, the last of the token itself.
      positions: [B, T] int32, of each token in its document and 0 of padding, where `segmented`, else None.
    """
    return forward(launcher.run, Tiling(shape), projected, taps, _or_placeholder(positions))


def convolved_heads_backward(
    shape: ConvolvedHeadsShape,
    projected: jax.Array,
    taps: jax.Array,
    positions: jax.Array | None,
    d_query: jax.Array,
    d_key: jax.Array,
    d_value: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The gradients of `projected`, in its dtype, and of `taps`, float32; see `convolved_heads_forward`."""
    d_results = tuple(d.astype(projected.dtype) for d in (d_query, d_key, d_value))
    return backward(launcher.run, Tiling(shape), projected, taps, _or_placeholder(positions), *d_results)


def forward(run: launcher.Run, tiling: Tiling, projected, taps, positions) -> tuple[Any, Any, Any]:
    """The forward kernel through `run`, on the arrays of whatever library it runs it with."""
    shape = tiling.shape
    query, key, value = run(forward_launch(tiling), projected, taps, positions)
    rows = shape.batch, shape.tokens, shape.num_heads
    of_keys = *rows, shape.key_dim
    return query.reshape(of_keys), key.reshape(of_keys), value.reshape(*rows, shape.value_dim)


def backward(run: launcher.Run, tiling: Tiling, projected, taps, positions, d_query, d_key, d_value) -> tuple[Any, Any]:
    """The backward kernel through `run`; see `convolved_heads_backward`."""
    rows = tiling.shape.batch, tiling.shape.tokens, -1
    d_results = tuple(d.reshape(rows) for d in (d_query, d_key, d_value))
    d_projected, d_taps = run(backward_launch(tiling), projected, taps, positions, *d_results)
    return d_projected, d_taps.sum((0, 1))


def _or_placeholder(positions: jax.Array | None) -> jax.Array:
    return jnp.zeros((1, 1), jnp.int32) if positions is None else positions
