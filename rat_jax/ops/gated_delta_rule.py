"""The gated delta rule: a matrix-valued state that forgets by a gate and rewrites what a key holds."""

from typing import Literal

import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import triton_tiling
from pallas_kernels.gated_delta_rule.shape import GatedDeltaRuleShape
from rat_jax.ops import context, cut, dispatch, gated_delta_rule_kernels, gated_delta_rule_xla, platform
from rat_jax.ops.gated_delta_rule_types import GatedDeltaRuleOutput
from rat_jax.ops.gated_delta_rule_xla import exact
from rat_jax.segments import SegmentInfo, as_segments, require_continuing
from rat_jax.shapes import Array, Float, Int

GatedDeltaRuleImplementation = Literal["xla", "triton"]

_FASTEST_FIRST = ("triton",)
_LEAST_LOG_DECAY = -1e3  # exp of it is 0 in float32, and sums of it are finite where those of -inf are not numbers


def gated_delta_rule(
    query: Float[Array, "B T N Hk"],
    key: Float[Array, "B T N Hk"],
    value: Float[Array, "B T N Hv"],
    log_decay: Float[Array, "B T N"],
    write_strength: Float[Array, "B T N"],
    *,
    segment_ids: Int[Array, "B T"] | SegmentInfo | None = None,
    initial_state: Float[Array, "B N Hk Hv"] | None = None,
    chunk_size: int = 64,
    implementation: GatedDeltaRuleImplementation | None = None,
) -> GatedDeltaRuleOutput:
    """S_t = a_t S_{t-1} + b_t k_t (v_t - a_t S_{t-1}^T k_t)^T and out_t = S_t^T q_t (arXiv 2412.06464, equation 10).

    a = exp(log_decay) is what a head keeps of its state, b = write_strength how much of what the key k_t held is
    replaced by v_t. Neither queries nor keys are normalised or scaled here; the state stays bounded where
    b |k|^2 <= 2 and log_decay <= 0. Values may have more channels than keys (Hv and Hk).

    The state is zero at the first token of every document. Padding leaves it as it is; what padding reads is finite
    and means nothing. Tokens are taken in chunks, as products of matrices (section 3.3 there): inside a chunk all
    corrections follow from one triangular system, and states are carried from chunk to chunk. The backward pass
    prepares the chunks again, so that memory grows with T.

    Gates, decays, the triangular system and the state are float32. Products are taken in the dtype of `value`, which
    `out` has too, and summed in float32. A single token (T = 1) is one update in float32.

    Args:
      log_decay: at most 0; -inf forgets everything.
      segment_ids: the document of each token, 0 for padding; None: each row is one document, which continues from
        `initial_state`. Ids alone start every document within the call; documents that continue from an earlier call
        are told by a `SegmentInfo`.
      initial_state: S before the first token, for the documents that began in an earlier call; None is zero.
      chunk_size: tokens of a chunk; kernels take 16, 32 or 64.
      implementation: None takes the fastest kernel of the platform that the program is lowered for where it takes the
        call, and "xla" elsewhere and for one token without an initial state.

    Raises:
      ValueError: if shapes do not fit each other, if `chunk_size` is below 1, or if an `initial_state` meets ids that
        leave no document to continue from it; the message names the argument.
      UnsupportedError: if a named implementation cannot run the call; the message says why and what comes nearest.
    """
    dispatch.check_implementation(implementation, GatedDeltaRuleImplementation)
    _check(query, key, value, log_decay, write_strength, initial_state, chunk_size)
    batch, tokens, heads, key_dim = key.shape
    if cut.is_cut():
        cut.refuse_state("initial_state", initial_state)
        arrays = (query, key, value, log_decay, write_strength, as_segments(segment_ids, (batch, tokens)))
        return GatedDeltaRuleOutput(
            *cut.run(
                lambda *parts: tuple(_of_part(*parts, chunk_size, implementation)),
                ("BTN",) * 5 + ("BT",),
                ("BTN", "BN"),
                *arrays,
            )
        )
    log_decay, write_strength = (x.astype(jnp.float32) for x in (log_decay, write_strength))
    log_decay = jnp.maximum(log_decay, _LEAST_LOG_DECAY)
    if segment_ids is None:
        starts = None
    else:
        require_continuing("initial_state", initial_state, segment_ids)
        segments = as_segments(segment_ids, (batch, tokens))
        starts = segments.starts()
        log_decay = jnp.where(segments.is_token[..., None], log_decay, 0.0)
        write_strength = jnp.where(segments.is_token[..., None], write_strength, 0.0)
    if initial_state is not None:
        initial_state = initial_state.astype(jnp.float32)
    arrays = (query.astype(value.dtype), key.astype(value.dtype), value, log_decay, write_strength)
    arrays += (initial_state, starts)
    shape = GatedDeltaRuleShape(
        dispatch.rows_of_device(batch),
        tokens,
        heads,
        key_dim,
        value.shape[-1],
        chunk_size,
        value.dtype.name,
        segmented=starts is not None,
        continued=initial_state is not None,
        capability=platform.expected_capability(),
    )
    order = _FASTEST_FIRST if tokens > 1 or shape.is_step else ()
    chosen = dispatch.choose(implementation, order, batch, lambda _: triton_tiling.unsupported_reason(shape))
    if chosen == "xla":
        return gated_delta_rule_xla.rule(*arrays, chunk_size)
    kernel = (gated_delta_rule_kernels.Step if shape.is_step else gated_delta_rule_kernels.Rule)(chosen, shape)
    return GatedDeltaRuleOutput(*dispatch.run(kernel, implementation is None, *arrays))


def _of_part(
    query: Array,
    key: Array,
    value: Array,
    log_decay: Array,
    write_strength: Array,
    segments: SegmentInfo,
    chunk_size: int,
    implementation: GatedDeltaRuleImplementation | None,
) -> GatedDeltaRuleOutput:
    """Of a part of a row: S_t = P_t S + S'_t, of the state S before it, the sums S' from 0 and the products P from I.

    Both come from one call, with the identity as more channels of the state and no values for them.
    """
    options = {"segment_ids": segments, "chunk_size": chunk_size, "implementation": implementation}
    if context.num_parts() == 1:
        return gated_delta_rule(query, key, value, log_decay, write_strength, **options)
    batch, _, heads, key_dim = key.shape
    value_dim = value.shape[-1]
    identity = jnp.broadcast_to(jnp.eye(key_dim, dtype=jnp.float32), (batch, heads, key_dim, key_dim))
    nothing = jnp.zeros((batch, heads, key_dim, value_dim), jnp.float32)
    more = jnp.pad(value, [(0, 0)] * 3 + [(0, key_dim)])
    start = jnp.concatenate([nothing, identity], axis=-1)
    own = gated_delta_rule(query, key, more, log_decay, write_strength, initial_state=start, **options)
    added, kept = jnp.split(own.final_state, [value_dim], axis=-1)

    def combine(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
        return exact(later[0], earlier[0]), exact(later[0], earlier[1]) + later[1]

    before = context.combined_before(combine, (kept, added), (identity, nothing))[1]
    out, readers = jnp.split(own.out, [value_dim], axis=-1)
    carried = jnp.einsum("btnk,bnkv->btnv", readers, before.astype(value.dtype), preferred_element_type=jnp.float32)
    final_state = context.of_last_part(exact(kept, before) + added)
    return GatedDeltaRuleOutput((out.astype(jnp.float32) + carried).astype(value.dtype), final_state)


def _check(query, key, value, log_decay, write_strength, initial_state, chunk_size) -> None:
    dispatch.check_floating(query=query, key=key, value=value, log_decay=log_decay, write_strength=write_strength)
    dispatch.check_whole(1, chunk_size=chunk_size)
    if key.ndim != 4:
        raise ValueError(f"key must be [B, T, N, Hk], got {key.shape}")
    wanted = {
        "query": (query, key.shape),
        "value": (value, (*key.shape[:3], value.shape[-1])),
        "log_decay": (log_decay, key.shape[:3]),
        "write_strength": (write_strength, key.shape[:3]),
    }
    if initial_state is not None:
        wanted["initial_state"] = (initial_state, (key.shape[0], *key.shape[2:], value.shape[-1]))
    for name, (array, shape) in wanted.items():
        if array.shape != shape:
            raise ValueError(f"{name} must be {shape} for keys of {key.shape}, got {array.shape}")
    if key.shape[1] < 1:
        raise ValueError(f"key must hold at least one token, got {key.shape}")
