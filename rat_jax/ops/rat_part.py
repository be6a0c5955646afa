"""The RAT mixing op by kernels where devices hold parts of rows (`rat_jax.ops.context`).

A part's own chunks are mixed by the kernels that mix whole rows. Its tokens also read the summaries of earlier parts,
1 / L of keys and values, which are gathered; both softmaxes join by their log-sum-exps. With the joined output and
log-sum-exp the kernels' backward pass gives the part's own share of each gradient.

Where documents are packed a part may begin inside of a chunk. It then reads the tokens of that chunk again that its
neighbour holds: L tokens come before its first, of which those of other chunks count as padding.
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention import cudnn_fmha, tpu_tiling
from pallas_kernels.attention.shape import AttentionShape
from pallas_kernels.rat.beyond import Beyond
from pallas_kernels.rat.shape import RatShape
from rat_jax.mesh import CONTEXT_AXIS
from rat_jax.ops import block_attention, context, dispatch, document_attention, earlier_parts, rat_xla
from rat_jax.ops.attention_types import KeyInfo
from rat_jax.ops.rope import rotate
from rat_jax.segments import PADDING, SegmentInfo
from rat_jax.shapes import Array, Float, Float32


@dataclasses.dataclass(frozen=True)
class MixPart(dispatch.Kernel):
    """Of `projected`, `gate_bias` and segments of a part's tokens: the mixed tokens."""

    implementation: str
    shape: RatShape  # of the part
    replicated: ClassVar[tuple[int, ...]] = (1,)
    num_differentiated: ClassVar[int] = 2
    saved_results: ClassVar[tuple[int, ...]] = (0,)

    def forward(self, projected: Array, gate_bias: Array, segments: SegmentInfo) -> tuple[tuple[Array], Any]:
        part = _Part(self.shape, segments)
        out, kept = self._run_forward(part, part.extend(projected), gate_bias)
        pairs = part.gather(kept.pairs)
        query = part.queries(projected)
        reader = self._reader(segments)
        if reader == "cudnn":
            beyond = earlier_parts.attend(query, *pairs)
        else:
            beyond = block_attention.attend(reader, query, *pairs, *part.places)
        again = out[:, : part.again] if part.again else None
        out = out[:, part.again :]
        own = document_attention.Attended(part.heads(out), kept.log_sum_exp[:, :, part.again :])
        mixed = document_attention.join(own, beyond._replace(out=part.gate(projected) * beyond.out))
        sums = jnp.concatenate([kept.log_sum_exp[:, :, : part.again], mixed.log_sum_exp], axis=2)
        beyond = beyond._replace(out=beyond.out.astype(out.dtype))
        return (mixed.out.reshape(out.shape).astype(out.dtype),), (kept._replace(log_sum_exp=sums), beyond, again)

    def plain(self, projected: Array, gate_bias: Array, segments: SegmentInfo) -> tuple[Array]:
        return (rat_xla.mix(self.shape, projected, gate_bias, segments).out,)

    def backward(self, arguments, saved, residuals, d_results) -> tuple[Array, Array]:
        projected, gate_bias, segments = arguments
        (out,), (d_out,), (kept, beyond, again) = saved, d_results, residuals
        part = _Part(self.shape, segments)
        query, pull_query = jax.vjp(part.queries, projected)
        pairs, pull_pairs = jax.vjp(part.gather, kept.pairs)
        d_heads = (part.heads(d_out) * part.gate(projected)).astype(projected.dtype)
        sums = kept.log_sum_exp[:, :, part.again :]
        delta = (part.heads(d_out) * part.heads(out)).sum(axis=-1).transpose(0, 2, 1)
        rows = sums, delta, d_heads
        reader = self._reader(segments)
        if reader == "cudnn":
            found = earlier_parts.gradients(query, *pairs, *rows)
        else:
            found = block_attention.gradients(reader, query, *pairs, *part.places, *rows)
        d_scores = document_attention.summed_score_gradients(beyond, *rows)
        d_scores = jnp.pad(d_scores, [(0, 0), (0, 0), (part.again, 0)])
        d_pairs = pull_pairs(_Pairs(found.d_key.astype(query.dtype), found.d_value.astype(query.dtype)))[0]
        seen, pull_seen = jax.vjp(part.extend, projected)
        d_out = jnp.pad(d_out, [(0, 0), (part.again, 0), (0, 0)])
        out = jnp.concatenate([again, out], axis=1) if part.again else out
        d_seen, d_bias = self._run_backward(part, kept, seen, gate_bias, out, d_out, d_pairs, d_scores)
        return pull_seen(d_seen)[0] + pull_query(found.d_query.astype(query.dtype))[0], d_bias

    def _reader(self, segments: SegmentInfo) -> block_attention.Implementation:
        """What reads earlier parts; cuDNN whole summaries of whole rows alone."""
        shape = self.shape
        sizes = (shape.batch, shape.tokens, shape.num_heads, shape.num_heads, shape.head_dim, shape.dtype)
        if self.implementation == "pallas_tpu":
            return "pallas_tpu" if tpu_tiling.unsupported_reason_of_heads(AttentionShape(*sizes)) is None else "xla"
        fits = cudnn_fmha.unsupported_reason(AttentionShape(*sizes, capability=shape.capability)) is None
        return "cudnn" if segments.contiguous and shape.num_chunks > 1 and fits else "xla"

    def _run_forward(self, part: "_Part", seen: Array, gate_bias: Array) -> tuple[Array, "_Kept"]:
        match self.implementation:
            case "pallas_tpu":
                from pallas_kernels.rat import tpu

                out, kept = tpu.rat_forward(part.shape, seen, gate_bias, **part.documents)
                sums, pairs = kept.log_sum_exp, _Pairs(kept.summary_key, kept.summary_value)
                kept = kept._replace(out=None, log_sum_exp=None, summary_key=None, summary_value=None)
            case gpu:
                from pallas_kernels.rat import triton  # imports Triton, which machines without a GPU may lack

                out, kept = triton.rat_forward(part.shape, seen, gate_bias, **part.documents, implementation=gpu)
                sums, pairs = kept.lse * math.log(2), _Pairs(kept.summary_keys, kept.summary_values)
                kept = kept._replace(out=None, lse=None, summary_keys=None, summary_values=None)
        return out, _Kept(sums, pairs, kept)

    def _run_backward(self, part: "_Part", kept: "_Kept", seen, gate_bias, out, d_out, d_pairs, d_scores):
        arrays = seen, gate_bias, d_out
        d_key, d_value = (x.astype(jnp.float32) for x in d_pairs)
        match self.implementation:
            case "pallas_tpu":
                from pallas_kernels.rat import tpu

                if self.shape.rope:
                    d_key = rotate(d_key, -part.slot_chunks, self.shape.rope_base)
                sums = {"log_sum_exp": kept.log_sum_exp, "summary_key": kept.pairs.key}
                residuals = kept.others._replace(out=out, summary_value=kept.pairs.value, **sums)
                beyond = Beyond(d_key, d_value, d_scores)
                return tpu.rat_backward(part.shape, residuals, *arrays, **part.documents, beyond=beyond)
            case gpu:
                from pallas_kernels.rat import triton

                sums = {"lse": kept.log_sum_exp / math.log(2), "summary_keys": kept.pairs.key}
                residuals = kept.others._replace(out=out, summary_values=kept.pairs.value, **sums)
                options = {"beyond": Beyond(d_key, d_value, d_scores), "implementation": gpu}
                return triton.rat_backward(part.shape, residuals, *arrays, **options)


class _Pairs(NamedTuple):
    """Chunk summaries: a part's own, or those of all parts."""

    key: Float[Array, "B C N H"]  # rotated
    value: Float[Array, "B C N H"]


class _Kept(NamedTuple):
    """What the kernels' backward pass needs."""

    log_sum_exp: Float32[Array, "B N T"]
    pairs: _Pairs
    others: Any  # residuals of the kernels without these and the output


class _Part:
    """Where a part's tokens and chunks lie. The kernels count chunks of the document under way from its first token."""

    def __init__(self, shape: RatShape, segments: SegmentInfo):
        size = shape.chunk_size
        self.again = 0 if segments.contiguous else size
        self.shape = dataclasses.replace(shape, tokens=shape.tokens + self.again, segmented=not segments.contiguous)
        self._own = segments
        document, position = segments.segment_ids[:, :1], segments.positions[:, :1]
        begun = position - position % size  # the chunk that the first token is in
        ids, positions = (self.extend(x) for x in (segments.segment_ids, segments.positions))
        is_before = jnp.arange(self.shape.tokens)[None] < self.again
        ids = jnp.where(is_before & ((ids != document) | (positions < begun)), PADDING, ids)
        goes_on = (ids == document) & (document != PADDING)
        positions = jnp.where(goes_on, positions - begun, positions)
        self.documents = {} if segments.contiguous else {"segment_ids": ids, "positions": positions}
        count = self.shape.num_chunks
        ends = (positions % size == size - 1) & (ids != PADDING)
        ends = jnp.pad(ends, [(0, 0), (0, count * size - self.shape.tokens)]).reshape(-1, count, size)
        self._is_complete = ends.any(axis=-1)
        at = jnp.arange(0, count * size, size)[None] + jnp.argmax(ends, axis=-1)
        self._slot_ids = jnp.where(self._is_complete, jnp.take_along_axis(ids, at, axis=1), PADDING)
        self.slot_chunks = jnp.take_along_axis(positions, at, axis=1) // size  # as the kernels count them
        self._chunks_before = jnp.where(jnp.take_along_axis(goes_on, at, axis=1), begun // size, 0)

    def extend(self, x: Array) -> Array:
        """A part's tokens with those that it reads again before them."""
        return jnp.concatenate([context.tokens_before(x, self.again), x], axis=1) if self.again else x

    def queries(self, projected: Float[Array, "B T c"]) -> Float[Array, "B T N H"]:
        """Queries of every head, rotated by the chunk's position in its document."""
        shape = self.shape
        grouped = shape.num_groups * shape.head_dim
        query = projected[..., 3 * shape.width : 3 * shape.width + grouped]
        query = query.reshape(*projected.shape[:2], shape.num_groups, shape.head_dim)
        if shape.rope:
            query = rotate(query, self._own.positions // shape.chunk_size, shape.rope_base)
        return jnp.tile(query, (1, 1, shape.heads_per_group, 1))

    def gather(self, own: _Pairs) -> _Pairs:
        """Summaries of all parts, rotated by the chunk's position in its document; 0 where no chunk is complete."""
        key, value = (jnp.where(self._is_complete[..., None, None], x, 0) for x in own)
        if self.shape.rope:
            key = rotate(key, self._chunks_before, self.shape.rope_base)
        return context.gather(_Pairs(key, value))

    @property
    def places(self) -> tuple[KeyInfo, KeyInfo]:
        """Of the part's tokens and of the summaries of all parts; only earlier parts have any that are seen."""
        ids = context.gather(self._slot_ids)
        of_part = jnp.arange(ids.shape[1]) // self._slot_ids.shape[1]
        ids = jnp.where(of_part[None] < jax.lax.axis_index(CONTEXT_AXIS), ids, PADDING)
        return KeyInfo.of(self._own), KeyInfo(ids, jnp.zeros_like(ids))

    def heads(self, x: Float[Array, "B T D"]) -> Float32[Array, "B T N H"]:
        return x.astype(jnp.float32).reshape(*x.shape[:2], self.shape.num_heads, self.shape.head_dim)

    def gate(self, projected: Float[Array, "B T c"]) -> Float32[Array, "B T N H"]:
        """sigmoid(z)."""
        return jax.nn.sigmoid(self.heads(projected[..., : self.shape.width]))
