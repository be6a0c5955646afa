"""The RAT mixing op by Triton kernels (arXiv 2507.04416): forward and backward on one device, for GPUs.

`projected` [B, T, 3 D + 2 G H] holds z, v, g (D channels each), q and k (G H each), in this order; D = N H, and head n
uses query and key group n mod G. With f = sigmoid(g + gate_bias), inside chunks of L tokens, state zero before a chunk:

    v~_t = f v~_{t-1} + (1 - f) v_t,    k~_t = f k~_{t-1} + (1 - f) k_t,
    out_t = sigmoid(z_t) softmax over {earlier chunks' last (k~, v~), (k~_t, v~_t)} of q_t . k~ / sqrt(H), times v~,

where RoPE, if on, rotates q by its chunk's index and a summary's k~ by its own chunk's index.

Forward: `rat_recurrence_forward`, `rat_attention_forward`. Backward: `rat_output_backward`, `rat_queries_backward`,
`rat_summaries_backward`, `rat_recurrence_backward`. Lowered text shows the names. Other back ends replace the
attention, Mosaic GPU also the backward recurrence of whole rows where `takes_backward_recurrence`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.launch import triton as launcher
from pallas_kernels.rat import (
    mosaic_gpu_tiling,
    triton_attention,
    triton_attention_backward,
    triton_recurrence,
    triton_recurrence_backward,
)
from pallas_kernels.rat.beyond import Beyond
from pallas_kernels.rat.seen_slots import SeenSlots
from pallas_kernels.rat.select import GpuImplementation, attention_passes
from pallas_kernels.rat.shape import RatShape
from pallas_kernels.rat.state import State
from pallas_kernels.rat.triton_rotation import rotation
from pallas_kernels.rat.triton_segments import Documents, continued_documents, documents_of


class Residuals(NamedTuple):
    """What the backward pass needs besides `projected` and `gate_bias`: `out` and about a fifth of its size."""

    out: jax.Array  # [B, T, D]
    lse: jax.Array  # [B, N, T] float32, log2 of the softmax's sum
    current_scores: jax.Array  # [B, N, T] float32, in powers of two
    rotated_queries: jax.Array  # [B, T, G, H], scaled
    summary_keys: jax.Array  # [B, C, N, H], rotated; C = ceil(T / L), of packed documents 0 without a complete chunk
    summary_values: jax.Array  # [B, C, N, H]
    running_values: jax.Array | None  # [B, T, N, H], where the backward pass reads them
    documents: Documents | None  # of packed documents, so that no layer of a model works them out again


def rat_forward(
    shape: RatShape,
    projected: jax.Array,
    gate_bias: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    implementation: GpuImplementation = "triton",
) -> tuple[jax.Array, Residuals]:
    """The mixed output [B, T, D] in the dtype of `projected`, and what `rat_backward` needs.

    Args:
      shape: sizes for which `select.unsupported_reason` of the implementation has no reason.
      projected: [B, T, 3 D + 2 G H], bfloat16, float16 or float32.
      gate_bias: [D] float32.
      segment_ids: [B, T] int32, 0 is padding, equal non-zero neighbours are one document; None is one document a row.
      positions: [B, T] int32, a token's index in its document, with `segment_ids` only. A document's tokens are
        neighbours: padding may occur between documents, not inside one, and a document starts with position 0.
      implementation: of the attention to summaries; the same for `rat_backward`.
    """
    documents = documents_of(shape, segment_ids, positions)
    arrays = projected, gate_bias.astype(jnp.float32), _angles(shape), documents
    return forward(launcher.run, shape, *arrays, implementation)


def rat_backward(
    shape: RatShape,
    residuals: Residuals,
    projected: jax.Array,
    gate_bias: jax.Array,
    d_out: jax.Array,
    *,
    implementation: GpuImplementation = "triton",
    beyond: Beyond | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The gradients of `projected` (in its dtype) and of `gate_bias` (float32) from `d_out`; see `rat_forward`.

    Of a part of a row `residuals` have the output and log-sum-exp of all parts, and `beyond` what else it needs, with
    gradients of rotated keys.
    """
    d_out, bias = d_out.astype(projected.dtype), gate_bias.astype(jnp.float32)
    documents = residuals.documents if shape.segmented else documents_of(shape, None, None)
    arrays = residuals, projected, bias, d_out, _angles(shape), documents
    d_projected, d_bias = backward(launcher.run, shape, *arrays, implementation, beyond)
    return d_projected, jnp.sum(d_bias, axis=(0, 1))


def rat_extend(
    shape: RatShape,
    projected: jax.Array,
    gate_bias: jax.Array,
    state: State,
    segment_ids: jax.Array,
    positions: jax.Array,
    first_slots: jax.Array,
    held: jax.Array,
    *,
    implementation: GpuImplementation = "triton",
) -> tuple[jax.Array, State]:
    """Reads tokens that follow a state: out [B, T, D], and the state with them.

    Args:
      shape: sizes for which `triton_tiling.unsupported_reason` has no reason; `continued`.
      projected, gate_bias: see `rat_forward`.
      state: of the tokens before these.
      segment_ids, positions, first_slots, held: see `triton_segments.continued_documents`.
      implementation: of the attention to summaries.
    """
    places = segment_ids, positions, first_slots, held
    return extend(launcher.run, shape, projected, gate_bias, state, *places, implementation)


def extend(
    run: launcher.Run,
    shape: RatShape,
    projected,
    gate_bias,
    state: State,
    segment_ids,
    positions,
    first_slots,
    held,
    implementation: GpuImplementation = "triton",
):
    """The kernels of `rat_extend` through `run`, on JAX arrays."""
    state_keys, state_values, summary_keys, summary_values = state
    chunk_size, capacity = shape.chunk_size, summary_keys.shape[1]
    documents, slots, slot_tokens = continued_documents(shape, segment_ids, positions, first_slots, held)
    count = capacity + shape.num_chunks + 1  # rows that outgrow the cache turn no further
    places = jnp.minimum(positions // chunk_size, count - 1) * chunk_size + positions % chunk_size
    is_token = segment_ids != 0
    last = jnp.max(jnp.where(is_token, jnp.arange(shape.tokens, dtype=jnp.int32)[None, :], -1), axis=1)
    values, current_scores, queries, keys, new_values, last_keys, last_values = run(
        triton_recurrence.forward_launch(shape),
        projected,
        gate_bias.astype(jnp.float32),
        *rotation(jnp.arange(count), shape.head_dim, shape.rope_base),
        jnp.where(documents.positions < 0, -1, places).astype(jnp.int32),
        documents.runs,
        slot_tokens,
        state_keys,
        state_values,
        last,
    )
    rows = jnp.arange(shape.batch)[:, None]
    summary_keys = summary_keys.at[rows, slots].set(keys, mode="drop")
    summary_values = summary_values.at[rows, slots].set(new_values, mode="drop")
    arrays = projected, values, current_scores, queries, summary_keys, summary_values
    if implementation == "triton":
        out, _ = run(triton_attention.forward_launch(shape, capacity), *arrays, *documents.of_slots)
    else:
        out, _ = attention_passes(implementation)[0](shape, *arrays, **_seen(documents))
    any_token = (last >= 0)[:, None, None]
    return out, State(
        jnp.where(any_token, last_keys, state_keys),
        jnp.where(any_token, last_values, state_values),
        summary_keys,
        summary_values,
    )


def forward(
    run: launcher.Run,
    shape: RatShape,
    projected,
    gate_bias,
    tables,
    documents,
    implementation: GpuImplementation = "triton",
) -> tuple[Any, Residuals]:
    """The forward kernels through `run`, on the arrays of whatever library it runs them with."""
    state = (documents.positions,) * 3  # placeholders
    values, current_scores, queries, keys, summaries, *_ = run(
        triton_recurrence.forward_launch(shape),
        projected, gate_bias, *tables, documents.positions, documents.runs, documents.slot_tokens, *state,
    )  # fmt: skip
    arrays = (projected, values, current_scores, queries, keys, summaries)
    if implementation == "triton":
        out, lse = run(triton_attention.forward_launch(shape), *arrays, *documents.of_slots)
    else:
        out, lse = attention_passes(implementation)[0](shape, *arrays, **_seen(documents))
    kept_values = values if implementation == "cudnn" else None
    kept_documents = documents.of_backward(implementation) if shape.segmented else None
    return out, Residuals(out, lse, current_scores, queries, keys, summaries, kept_values, kept_documents)


def backward(
    run: launcher.Run,
    shape: RatShape,
    residuals: Residuals,
    projected,
    gate_bias,
    d_out,
    tables,
    documents,
    implementation: GpuImplementation = "triton",
    beyond: Beyond | None = None,
) -> tuple[Any, Any]:
    """The backward kernels through `run`; the bias gradient is left as partial sums [B, blocks, D]."""
    r = residuals
    d_projected, d_heads, delta = run(triton_attention_backward.output_launch(shape), projected, r.out, d_out)
    shared = (d_heads, delta, r.lse, r.rotated_queries, r.summary_keys, r.summary_values)
    if implementation == "triton":
        d_queries, d_current_scores, current_weights = run(
            triton_attention_backward.queries_launch(shape), *shared, *documents.of_slots, r.current_scores
        )
        d_keys, d_values = run(
            triton_attention_backward.summaries_launch(shape),
            *shared, documents.segment_ids, documents.last_tokens, documents.slot_tokens, documents.slot_segments,
        )  # fmt: skip
    else:
        more = () if r.running_values is None else (r.running_values,)
        d_queries, d_current_scores, current_weights, d_keys, d_values = attention_passes(implementation)[1](
            shape, *shared, r.current_scores, *more, **_seen(documents)
        )
    if beyond is not None:
        d_keys, d_values = d_keys + beyond.d_summary_keys, d_values + beyond.d_summary_values
        if implementation != "cudnn":  # the others take what the call's own summaries leave for the current scores'
            d_current_scores = d_current_scores - beyond.d_scores / math.sqrt(shape.head_dim)
    gradients = current_weights, d_current_scores, d_heads, d_queries, d_keys, d_values, d_projected
    if implementation == "mosaic_gpu" and mosaic_gpu_tiling.takes_backward_recurrence(shape):
        from pallas_kernels.rat import mosaic_gpu_recurrence_backward

        return mosaic_gpu_recurrence_backward.backward(shape, projected, gate_bias, *tables, *gradients)
    d_bias, _, d_projected = run(
        triton_recurrence_backward.backward_launch(shape),
        projected, gate_bias, *tables, documents.positions, documents.runs, *gradients,
    )  # fmt: skip
    return d_projected, d_bias


def _seen(documents: Documents) -> dict[str, SeenSlots]:
    """What other back ends than Triton read of packed documents."""
    return {} if documents.seen is None else {"seen": documents.seen}


def _angles(shape: RatShape) -> tuple[jax.Array, jax.Array]:
    return rotation(jnp.arange(shape.num_chunks), shape.head_dim, shape.rope_base)
