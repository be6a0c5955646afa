"""Softmax attention over packed documents by the Mosaic GPU kernels of RAT's attention to slots, each token a slot.

A token sees the keys from the start of its document, or of its window, to itself: neither bound falls along a row, so
that tiles of keys outside of both are not read, and those inside need no mask.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.mosaic_gpu_tiling import heads_together, slots_of
from pallas_kernels.attention.shape import AttentionShape
from pallas_kernels.launch.sizes import LOG2_E, SEES_NOTHING
from pallas_kernels.rat import mosaic_gpu_attention, mosaic_gpu_attention_backward
from pallas_kernels.rat.mosaic_gpu_tiling import pad_seen, pad_summaries, pad_tokens, padded
from pallas_kernels.rat.seen_slots import SeenSlots, document_begins


def forward(
    shape: AttentionShape,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    documents: jax.Array | None,
    *,
    scale: float,
    window: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """out_t = sum_s p_ts v_s, p_t the softmax of scale q_t . k_s over s <= t of one document, and its log-sum-exp.

    Args:
      shape: sizes for which `mosaic_gpu_tiling.unsupported_reason` has no reason.
      query: [B, T, N, H]; head n reads key head n // (N / K).
      key, value: [B, T, K, H].
      documents: whole numbers [B, T], neighbours of one number are one document; 0 is padding, which sees nothing;
        None: each row is one document.
      scale: of the scores.
      window: a query sees itself and so many earlier keys; None is all of them.

    Returns:
      [B, T, N, H] in the dtype of `query`, zero where no key is seen, and float32 [B, T, N], very negative there.
    """
    slots, seen = slots_of(shape), _seen(query, documents, window)
    out, lse = mosaic_gpu_attention.attend(
        padded(slots),
        *(None, None, None),
        pad_tokens(slots, _in_powers_of_two(query, scale), 1),
        *(pad_summaries(slots, x, seen) for x in (key, value)),
        seen=pad_seen(slots, seen),
        together=heads_together(shape),
    )
    out, lse = out[:, : shape.tokens], jnp.swapaxes(lse[:, :, : shape.tokens], 1, 2)
    return out, jnp.where(lse > SEES_NOTHING, lse / LOG2_E, SEES_NOTHING)


def backward(
    shape: AttentionShape,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    documents: jax.Array | None,
    out: jax.Array,
    log_sum_exp: jax.Array,
    d_out: jax.Array,
    *,
    scale: float,
    window: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of query, key and value from that of `out`, each in its own shape and dtype.

    Args:
      shape, query, key, value, documents, scale, window: see `forward`.
      out, log_sum_exp: what `forward` gave.
      d_out: [B, T, N, H].
    """
    slots, seen = slots_of(shape), _seen(query, documents, window)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    rows = (jnp.swapaxes(x, 1, 2) for x in (delta, log_sum_exp * LOG2_E))
    shared = (
        pad_tokens(slots, d_out.astype(query.dtype), 1),
        *(pad_tokens(slots, x, 2) for x in rows),
        pad_tokens(slots, _in_powers_of_two(query, scale), 1),
        *(pad_summaries(slots, x, seen) for x in (key, value)),
        pad_seen(slots, seen),
    )
    options = {"scale": scale, "together": heads_together(shape)}
    d_query, _ = mosaic_gpu_attention_backward.queries_gradients(padded(slots), *shared, **options)
    d_key, d_value = mosaic_gpu_attention_backward.summaries_gradients(padded(slots), *shared, rounded=True)
    return tuple(x[:, : shape.tokens] for x in (d_query, d_key, d_value))


def _seen(query: jax.Array, documents: jax.Array | None, window: int | None) -> SeenSlots:
    token = jnp.arange(query.shape[1], dtype=jnp.int32)[None, :]
    if documents is None:
        first = jnp.maximum(token - window, 0) if window is not None else jnp.zeros_like(token)
        return SeenSlots(*(jnp.broadcast_to(x, query.shape[:2]) for x in (first, token + 1)))
    is_token, first = documents != 0, document_begins(documents)
    if window is not None:
        first = jnp.maximum(first, token - window)
    end = jax.lax.cummax(jnp.where(is_token, token + 1, 0), axis=1)
    return SeenSlots(jnp.where(is_token, first, end), end)


def _in_powers_of_two(query: jax.Array, scale: float) -> jax.Array:
    """Queries whose products with keys are scores in powers of two; rounded once."""
    return (query.astype(jnp.float32) * (scale * LOG2_E)).astype(query.dtype)
