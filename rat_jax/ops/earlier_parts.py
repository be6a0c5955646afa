"""Attention of the tokens of a part to all keys of earlier parts of their rows, where rows are one document each.

cuDNN's attention without a mask takes the keys of one other part after the other; what comes of later parts is left
out. The functions are those of `rat_jax.ops.document_attention`.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import cudnn_fmha
from rat_jax.mesh import CONTEXT_AXIS
from rat_jax.ops import context
from rat_jax.ops.document_attention import Attended, ScoreGradients, join
from rat_jax.shapes import Array, Bool, Float, Float32, Int

_NOTHING = -1e30  # log-sum-exp where no key is seen


def attend(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K H"]) -> Attended:
    """As `document_attention.attend`, of the keys of all parts, of which earlier ones are seen."""

    def add_part(sums: Attended, distance: Int[Array, ""]) -> tuple[Attended, None]:
        start, is_earlier = _part(key, distance)
        out, found = cudnn_fmha.forward(query, *_keys(start, key, value), scale=_scale(query), causal=False)
        return join(sums, Attended(out.astype(jnp.float32), jnp.where(is_earlier, found, _NOTHING))), None

    batch, tokens, heads, _ = query.shape
    nothing = Attended(jnp.zeros(query.shape, jnp.float32), jnp.full((batch, heads, tokens), _NOTHING, jnp.float32))
    return jax.lax.scan(add_part, nothing, _distances())[0]


def score_gradients(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    log_sum_exp: Float32[Array, "B N T"],
    delta: Float32[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
) -> ScoreGradients:
    """As `document_attention.score_gradients`, of the keys of all parts, of which earlier ones are seen."""
    # Of the output cuDNN takes its product with d_out alone, which is delta for this multiple of d_out.
    wide = d_out.astype(jnp.float32)
    norms = jnp.sum(wide * wide, axis=-1)
    multiple = jnp.where(norms > 0, delta.transpose(0, 2, 1) / jnp.where(norms > 0, norms, 1.0), 0.0)
    out = (multiple[..., None] * wide).astype(d_out.dtype)

    def add_part(sums: ScoreGradients, distance: Int[Array, ""]) -> tuple[ScoreGradients, None]:
        start, is_earlier = _part(key, distance)
        keys = _keys(start, key, value)
        seen = jnp.where(is_earlier, d_out, 0)
        d_query, *d_keys = cudnn_fmha.backward(query, *keys, out, log_sum_exp, seen, scale=_scale(query), causal=False)
        # sum_s p_ts (d_out_t . v_s - delta_t) is by what of this part alone is read.
        own, own_sums = cudnn_fmha.forward(query, *keys, scale=_scale(query), causal=False)
        read = (seen.astype(jnp.float32) * own.astype(jnp.float32)).sum(axis=-1).transpose(0, 2, 1)
        d_scores = jnp.where(is_earlier, jnp.exp(own_sums - log_sum_exp) * (read - delta), 0.0)
        d_key, d_value = (
            jax.lax.dynamic_update_slice_in_dim(total, x.astype(jnp.float32), start, axis=1)
            for total, x in zip((sums.d_key, sums.d_value), d_keys, strict=True)
        )
        return ScoreGradients(sums.d_query + d_query, d_key, d_value, sums.d_scores + d_scores), None

    like_query, like_key = (jnp.zeros(x.shape, jnp.float32) for x in (query, key))
    nothing = ScoreGradients(like_query, like_key, like_key, jnp.zeros(delta.shape, jnp.float32))
    return jax.lax.scan(add_part, nothing, _distances())[0]


def _distances() -> Int[Array, " _"]:
    return jnp.arange(1, context.num_parts(), dtype=jnp.int32)


def _part(key: Array, distance: Array) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    """The first key of the part so many before this one, counted around the row, and whether it is before it."""
    own, parts = jax.lax.axis_index(CONTEXT_AXIS), context.num_parts()
    return (own - distance) % parts * (key.shape[1] // parts), distance <= own


def _keys(start: Array, key: Array, value: Array) -> tuple[Array, Array]:
    count = key.shape[1] // context.num_parts()
    return tuple(jax.lax.dynamic_slice_in_dim(x, start, count, axis=1) for x in (key, value))


def _scale(query: Array) -> float:
    return query.shape[-1] ** -0.5
