"""A causal convolution over a few tokens, each channel by itself, within documents."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rat_jax.segments import SegmentInfo
from rat_jax.shapes import Array, Float, Float32, Int


class ShortConvolutionOutput(NamedTuple):
    """The convolved tokens, and the inputs that the next tokens of each row will need."""

    out: Float32[Array, "B T c"]
    last_inputs: Float[Array, "B earlier c"] | None


def short_convolution(
    x: Float[Array, "B T c"],
    kernel: Float32[Array, "taps c"],
    segments: SegmentInfo,
    last_inputs: Float[Array, "B earlier c"] | None = None,
) -> ShortConvolutionOutput:
    """out_t = sum_{i < taps} kernel_{taps-1-i} x_{t-i} over the tokens t - i of the same document; in float32.

    The last row of `kernel` is that of the token itself, as in a depthwise `Conv1d` of PyTorch. What padding reads is
    finite and means nothing.

    Args:
      last_inputs: of each row the last taps - 1 tokens of earlier calls, padding not counted, the latest last; zeros
        where there were fewer. None: the tokens start their rows, and none are returned.

    Raises:
      ValueError: if the kernel has other channels than x, or `last_inputs` another shape than it must have.
    """
    batch, tokens, channels = x.shape
    if kernel.ndim != 2 or kernel.shape[1] != channels:
        raise ValueError(f"kernel must be [taps, {channels}] for x of {x.shape}, got {kernel.shape}")
    reach = kernel.shape[0] - 1
    if last_inputs is None:
        inputs = jnp.pad(x, [(0, 0), (reach, 0), (0, 0)])
    else:
        if last_inputs.shape != (batch, reach, channels):
            raise ValueError(f"last_inputs must be {(batch, reach, channels)}, got {last_inputs.shape}")
        last_inputs = last_inputs.astype(x.dtype)
        inputs = _join(last_inputs, x, segments)
    out = jnp.zeros(x.shape, jnp.float32)
    for i in range(reach + 1):
        earlier = inputs[:, reach - i : reach - i + tokens].astype(jnp.float32)
        if i and not (segments.contiguous and last_inputs is None):
            # Tokens of a document are neighbours: its token i places ago is i columns ago, or was not there.
            earlier = jnp.where((segments.positions >= i)[..., None], earlier, 0.0)
        out += earlier * kernel[reach - i][None, None]
    return ShortConvolutionOutput(out, None if last_inputs is None else next_inputs(last_inputs, x, segments))


def _join(last_inputs: Array, x: Array, segments: SegmentInfo) -> Array:
    """taps - 1 columns and x, with the last inputs right before each row's first token."""
    batch, reach, _ = last_inputs.shape
    if reach == 0:
        return x
    if x.shape[1] == 1:  # no scatter, so that XLA joins a step's convolution with what surrounds it
        return jnp.concatenate([last_inputs, x], axis=1)
    rows, places = jnp.arange(batch)[:, None], first_columns(segments, reach)
    return jnp.pad(x, [(0, 0), (reach, 0), (0, 0)]).at[rows, places].set(last_inputs)


def first_columns(segments: SegmentInfo, count: int) -> Int[Array, "B n"]:
    """So many columns from each row's first token on, or from its start where it has none; they may end after it."""
    return jnp.argmax(segments.is_token, axis=1)[:, None] + jnp.arange(count)[None]


def next_inputs(
    last_inputs: Float[Array, "B earlier c"], x: Float[Array, "B T c"], segments: SegmentInfo
) -> Float[Array, "B earlier c"]:
    """The last inputs of each row after x: its last tokens and, where it has fewer, some of those before them."""
    reach = last_inputs.shape[1]
    if reach == 0:
        return last_inputs
    if x.shape[1] == 1:
        return jnp.where(segments.is_token[..., None], jnp.concatenate([last_inputs[:, 1:], x], axis=1), last_inputs)
    first, columns = first_columns(segments, 1), jnp.arange(x.shape[1])[None]
    last = jnp.max(jnp.where(segments.is_token, columns, -1), axis=1)[:, None]
    ends = last + 1 - reach + jnp.arange(reach)[None]
    earlier = columns_at(last_inputs, ends - first + reach)
    return jnp.where((ends >= first)[..., None], columns_at(x, ends), earlier)


def columns_at(x: Array, places: Int[Array, "B n"]) -> Array:
    """Of [B, T, ...] some columns; the nearest where there is none."""
    return jax.vmap(lambda row, places: row[jnp.clip(places, 0, row.shape[0] - 1)])(x, places)
