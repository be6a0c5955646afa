"""The RAT mixing op by Triton kernels (arXiv 2507.04416): forward and backward on one device, for GPUs.

`projected` [B, T, 3 D + 2 G H] holds z, v, g (D channels each), q and k (G H each), in this order; D = N H, and head n
uses query and key group n mod G. With f = sigmoid(g + gate_bias), inside chunks of L tokens, state zero before a chunk:

    v~_t = f v~_{t-1} + (1 - f) v_t,    k~_t = f k~_{t-1} + (1 - f) k_t,
    out_t = sigmoid(z_t) softmax over {earlier chunks' last (k~, v~), own (k~_t, v~_t)} of q_t . k~ / sqrt(H), times v~,

where RoPE, if on, rotates q by its chunk's index and a summary's k~ by its own chunk's index.

Forward: `rat_recurrence_forward`, `rat_attention_forward`. Backward: `rat_output_backward`, `rat_queries_backward`,
`rat_summaries_backward`, `rat_recurrence_backward`. The names stand in lowered text.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.triton import attention, attention_backward, call, decode, recurrence, recurrence_backward
from pallas_kernels.triton.problem import Problem, cdiv, check, problem_of


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["out", "lse", "own_scores", "rotated_queries", "summary_keys", "summary_values"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the backward pass needs beside `projected` and `gate_bias`: `out` and about a fifth of its size."""

    out: jax.Array  # [B, T, D]
    lse: jax.Array  # [B, N, T] float32, log2 of the softmax's sum
    own_scores: jax.Array  # [B, N, T] float32, in powers of two
    rotated_queries: jax.Array  # [B, T, G, H], scaled
    summary_keys: jax.Array  # [B, C, N, H], rotated; C = ceil(T / L), a slot without a complete chunk is undefined
    summary_values: jax.Array  # [B, C, N, H]


def rat_forward(
    projected: jax.Array,
    gate_bias: jax.Array,
    *,
    num_heads: int,
    num_groups: int,
    chunk_size: int,
    rope_base: float | None,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
) -> tuple[jax.Array, Residuals]:
    """The mixed output [B, T, D] in the dtype of `projected`, and what `rat_backward` needs.

    Args:
      projected: [B, T, 3 D + 2 G H], bfloat16, float16 or float32.
      gate_bias: [D] float32.
      rope_base: None is no RoPE.
      segment_ids: [B, T] int32, 0 is padding, equal non-zero neighbours are one document; None is one document a row.
      positions: [B, T] int32, a token's index in its document, with `segment_ids` only. A document's tokens are
        neighbours: padding may stand between documents, not inside one, and a document starts with position 0.

    Raises:
      NotImplementedError: a shape that `problem.refusal` gives a reason for.
    """
    problem = _problem(projected, num_heads, num_groups, chunk_size, rope_base, segment_ids)
    documents = _documents(problem, segment_ids, positions)
    tables = _angles(problem, rope_base)
    return forward(call.run, problem, projected, gate_bias.astype(jnp.float32), tables, documents)


def rat_backward(
    residuals: Residuals,
    projected: jax.Array,
    gate_bias: jax.Array,
    d_out: jax.Array,
    *,
    num_heads: int,
    num_groups: int,
    chunk_size: int,
    rope_base: float | None,
    segment_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The gradients of `projected` (in its dtype) and of `gate_bias` (float32) from `d_out`; see `rat_forward`."""
    problem = _problem(projected, num_heads, num_groups, chunk_size, rope_base, segment_ids)
    documents = _documents(problem, segment_ids, positions)
    tables = _angles(problem, rope_base)
    d_projected, d_bias = backward(
        call.run,
        problem,
        residuals,
        projected,
        gate_bias.astype(jnp.float32),
        d_out.astype(projected.dtype),
        tables,
        documents,
    )
    return d_projected, jnp.sum(d_bias, axis=(0, 1))


def forward(run: call.Run, problem: Problem, projected, gate_bias, tables, documents) -> tuple[Any, Residuals]:
    """The forward kernels through `run`, on the arrays of whatever library it runs them with."""
    values, own_scores, queries, keys, summaries = run(
        recurrence.forward_launch(problem), projected, gate_bias, *tables, documents.positions, documents.chunk_starts
    )
    out, lse = run(
        attention.forward_launch(problem), projected, values, own_scores, queries, keys, summaries, *documents.of_slots
    )
    return out, Residuals(out, lse, own_scores, queries, keys, summaries)


def backward(
    run: call.Run, problem: Problem, residuals: Residuals, projected, gate_bias, d_out, tables, documents
) -> tuple[Any, Any]:
    """The backward kernels through `run`; the bias gradient is left as partial sums [B, blocks, D]."""
    r = residuals
    d_projected, d_heads, delta = run(attention_backward.output_launch(problem), projected, r.out, d_out)
    shared = (d_heads, delta, r.lse, r.rotated_queries, r.summary_keys, r.summary_values)
    d_queries, d_own_scores, own_weights = run(
        attention_backward.queries_launch(problem), *shared, *documents.of_slots, r.own_scores
    )
    segment_ids, _, slot_tokens, slot_segments = documents.of_slots
    d_keys, d_values = run(
        attention_backward.summaries_launch(problem),
        *shared, segment_ids, documents.last_tokens, slot_tokens, slot_segments,
    )  # fmt: skip
    d_bias, _, d_projected = run(
        recurrence_backward.backward_launch(problem),
        projected, gate_bias, *tables, documents.positions, documents.chunk_starts, own_weights, d_own_scores,
        d_heads, d_queries, d_keys, d_values, d_projected,
    )  # fmt: skip
    return d_projected, d_bias


@dataclasses.dataclass(frozen=True)
class Documents:
    """Where packed documents and their chunks lie; placeholders where every row is one document."""

    positions: Any  # [B, T] int32
    chunk_starts: Any  # [B, T] int32: array index of the first token of the token's chunk, -1 for padding
    segment_ids: Any  # [B, T] int32
    first_slots: Any  # [B, T] int32: the first slot that a chunk of the token's document, or of a later one, can lie in
    slot_tokens: Any  # [B, C] int32: array index of the token that completes a slot's chunk, -1 if none does
    slot_segments: Any  # [B, C] int32: that token's document
    last_tokens: Any  # [B, ceil(C / KEYS)] int32: one past the last token that may see a block of KEYS slots

    @property
    def of_slots(self) -> tuple[Any, Any, Any, Any]:
        return self.segment_ids, self.first_slots, self.slot_tokens, self.slot_segments


def _problem(projected, num_heads, num_groups, chunk_size, rope_base, segment_ids) -> Problem:
    problem = problem_of(
        projected.shape,
        projected.dtype.name,
        num_heads=num_heads,
        num_groups=num_groups,
        chunk_size=chunk_size,
        rope=rope_base is not None,
        segmented=segment_ids is not None,
    )
    check(problem)
    return problem


def _angles(problem: Problem, rope_base: float | None) -> tuple[jax.Array, jax.Array]:
    return decode.angle_tables(problem.head_dim, problem.slots, rope_base)


def _documents(problem: Problem, segment_ids: jax.Array | None, positions: jax.Array | None) -> Documents:
    if segment_ids is None:
        return Documents(*(jnp.zeros((1, 1), jnp.int32),) * 7)
    if positions is None:
        raise ValueError("segment_ids need positions")
    p = problem
    token = jnp.arange(p.tokens, dtype=jnp.int32)[None, :]
    is_token = segment_ids != 0
    starts = is_token & (positions % p.chunk_size == 0)
    chunk_starts = jnp.where(is_token, jax.lax.cummax(jnp.where(starts, token, -1), axis=1), -1)
    begins = jax.lax.cummax(jnp.where(is_token & (positions == 0), token, 0), axis=1)
    first_slots = begins // p.chunk_size
    ends = jnp.where(is_token & (positions % p.chunk_size == p.chunk_size - 1), token, -1)
    ends = jnp.pad(ends, ((0, 0), (0, p.slots * p.chunk_size - p.tokens)), constant_values=-1)
    slot_tokens = jnp.max(ends.reshape(p.batch, p.slots, p.chunk_size), axis=2)
    slot_segments = jnp.take_along_axis(segment_ids, jnp.maximum(slot_tokens, 0), axis=1)
    keys = dict(attention_backward.summaries_launch(p).constants)["KEYS"]
    last_slots = jnp.minimum((jnp.arange(cdiv(p.slots, keys)) + 1) * keys, p.slots) - 1
    last_tokens = jax.vmap(lambda slots: jnp.searchsorted(slots, last_slots, side="right"))(first_slots)
    return Documents(
        positions.astype(jnp.int32),
        chunk_starts,
        segment_ids.astype(jnp.int32),
        first_slots,
        slot_tokens,
        slot_segments,
        last_tokens.astype(jnp.int32),
    )
