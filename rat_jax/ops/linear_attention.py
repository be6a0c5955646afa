"""Linear attention: a matrix-valued state that only grows, read through non-negative features."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from pallas_kernels.linear_attention import select
from pallas_kernels.linear_attention.shape import LinearAttentionShape
from rat_jax.ops import context, cut, dispatch, linear_attention_kernels, linear_attention_xla, platform
from rat_jax.ops.linear_attention_types import FeatureMap, LinearAttentionOutput
from rat_jax.ops.linear_attention_xla import features, lagged
from rat_jax.segments import SegmentInfo, as_segments, require_continuing
from rat_jax.shapes import Array, Float, Float32, Int

__all__ = ["FeatureMap", "LinearAttentionOutput", "LinearImplementation", "linear_attention"]

LinearImplementation = Literal["xla", "triton", "mosaic_gpu", "pallas_tpu"]
_FASTEST_FIRST = ("mosaic_gpu", "triton", "pallas_tpu")
_TAKE_KEY_LAG = ("mosaic_gpu", "xla")


def linear_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    feature_map: FeatureMap = "softmax",
    key_lag: int = 0,
    segment_ids: Int[Array, "B T"] | SegmentInfo | None = None,
    initial_state: Float[Array, "b n E H"] | None = None,
    state: Float32[Array, "B K E H"] | None = None,
    implementation: LinearImplementation | None = None,
) -> LinearAttentionOutput:
    """out_t = phi(q_t) (S_0 + sum_{s <= t - key_lag} phi(k_s)^T v_s), over the s of the same document; no normaliser.

    phi(x) = [m(x), m(-x)], m the softmax over the H channels or the positive part (arXiv 2506.15545, section 3). Head n
    reads key head n // (N / K). Features and states are float32; their products are taken in the dtype of `value`
    (float32, bfloat16 or float16), which `out` has too, and summed in float32.

    Args:
      query, key, value: q, k, v.
      feature_map: m, "softmax" or "relu".
      key_lag: query t sees keys s <= t - key_lag.
      segment_ids: 0 is padding, which adds nothing and whose results have no meaning; it may lie before, after and
        between documents but not inside one, where a `key_lag` would count it as tokens. Neighbours of the same other
        value are one document. None: each row is one document.
      initial_state: S_0, from which every document starts: of every row or of all together (b is B or 1), of every
        query head or of every key head (n is N or K); None is zero.
      state: what earlier tokens of the document under way have summed up to, without S_0; None is zero. It is that of
        the row without `segment_ids`, and of the tokens before the first start of a `SegmentInfo` that continues from
        earlier tokens. Not together with `key_lag`.
      implementation: None takes the fastest kernel for the platform that the program is lowered for that takes the
        call, and "xla" where there is none. Beside a `state` "triton" takes one token a row, "xla" any number.

    Raises:
      ValueError: if shapes, `feature_map` or `key_lag` do not fit, or a `state` meets ids that leave nothing to
        continue from it.
      UnsupportedError: if a named implementation cannot run the call; the message says why and what comes nearest.
    """
    dispatch.check_implementation(implementation, LinearImplementation)
    dispatch.check_floating(query=query, key=key, value=value)
    dispatch.check_heads(query=query, key=key, value=value)
    dispatch.check_whole(0, key_lag=key_lag)
    require_continuing("state", state, segment_ids)
    segments = as_segments(segment_ids, query.shape[:2])
    if cut.is_cut():
        cut.refuse_state("state", state)
        options = {"feature_map": feature_map, "key_lag": key_lag, "implementation": implementation}
        of_rows = "B" if initial_state is not None and initial_state.shape[0] > 1 else "_"
        arrays = (query, key, value, segments, initial_state)
        axes = ("BTN", "BTN", "BTN", "BT", f"{of_rows}N")
        return LinearAttentionOutput(
            *cut.run(lambda *parts: tuple(_attend_part(*parts, **options)), axes, ("BTN", "BN"), *arrays)
        )
    shape = _shape(query, key, value, initial_state, feature_map, key_lag)
    if state is not None:
        batch, _, key_heads, head_dim = key.shape
        if state.shape != (batch, key_heads, 2 * head_dim, head_dim):
            raise ValueError(f"state must be {(batch, key_heads, 2 * head_dim, head_dim)}, got {state.shape}")
        if key_lag:
            raise ValueError(f"a key_lag ({key_lag}) is not taken together with a state; shift keys and values instead")
    documents = None
    if not segments.contiguous or (state is not None and segment_ids is not None):  # some tokens may not see the state
        enters = segments.is_token
        if key_lag:
            key, value, ids = (lagged(x, key_lag) for x in (key, value, segments.segment_ids))
            enters &= ids == segments.segment_ids
        value = jnp.where(enters[..., None, None], value, 0)
        documents = jnp.cumsum(segments.starts(), axis=1, dtype=jnp.int32)
        shape = dataclasses.replace(shape, key_lag=0, segmented=True)
    shape = dataclasses.replace(shape, continued=state is not None, capability=platform.expected_capability())

    def unsupported_reason(name: str) -> str | None:
        taken = shape if name in _TAKE_KEY_LAG else dataclasses.replace(shape, key_lag=0)
        return dispatch.differing_dtypes(query, key, value) or select.unsupported_reason(name, taken)

    chosen = dispatch.choose(implementation, _FASTEST_FIRST, query.shape[0], unsupported_reason)
    if chosen == "xla":
        arrays = (query, key, value, initial_state, documents, state)
        return linear_attention_xla.attend(shape.feature_map, shape.key_lag, *arrays)
    if chosen not in _TAKE_KEY_LAG and shape.key_lag:
        key, value = (lagged(x, shape.key_lag) for x in (key, value))
        shape = dataclasses.replace(shape, key_lag=0)
    shared = initial_state is not None and initial_state.shape[0] == 1
    if state is not None:
        one = linear_attention_kernels.Step(chosen, shape, replicated=(4,) if shared else ())
        arrays = (query, key, value, documents, initial_state, state)
        return LinearAttentionOutput(*dispatch.run(one, implementation is None, *arrays))
    kernel = linear_attention_kernels.Attend(chosen, shape, replicated=(3,) if shared else ())
    arrays = (query, key, value, initial_state, documents)
    return LinearAttentionOutput(*dispatch.run(kernel, implementation is None, *arrays))


def _attend_part(
    query: Array,
    key: Array,
    value: Array,
    segments: SegmentInfo,
    initial_state: Array | None,
    *,
    feature_map: FeatureMap,
    key_lag: int,
    implementation: LinearImplementation | None,
) -> LinearAttentionOutput:
    """Of a part of a row: its own keys by any implementation, and what earlier parts have summed up.

    Both are linear in the state, so that the part before need not have ended when the part's own sums are made.
    """
    options = {"feature_map": feature_map, "initial_state": initial_state, "implementation": implementation}
    if context.num_parts() == 1:
        return linear_attention(query, key, value, key_lag=key_lag, segment_ids=segments, **options)
    enters = segments.is_token
    if key_lag:
        ids = segments.segment_ids
        key, value, ids = (
            jnp.concatenate([context.tokens_before(x, key_lag), x], axis=1)[:, : x.shape[1]] for x in (key, value, ids)
        )
        enters &= ids == segments.segment_ids
    value = jnp.where(enters[..., None, None], value, 0)
    # Kernels need no documents where there is one a row: nothing of a row ends in any of its parts.
    own = linear_attention(query, key, value, segment_ids=None if segments.contiguous else segments, **options)
    starts = segments.starts()
    documents = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
    is_last = documents == documents[:, -1:]
    key_features = features(key, feature_map).astype(value.dtype)
    added = jnp.einsum(
        "btke,btkh->bkeh",
        key_features,
        jnp.where(is_last[..., None, None], value, 0),
        preferred_element_type=jnp.float32,
    )
    goes_on = jnp.where(starts.any(axis=1), 0.0, 1.0)[:, None, None, None]

    def combine(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    nothing = jnp.ones_like(goes_on), jnp.zeros_like(added)
    before = context.combined_before(combine, (goes_on, added), nothing)[1]
    batch, tokens, heads, _ = query.shape
    key_heads = key.shape[2]
    grouped = features(query, feature_map).astype(value.dtype).reshape(batch, tokens, key_heads, heads // key_heads, -1)
    carried = jnp.einsum("btkre,bkeh->btkrh", grouped, before.astype(value.dtype), preferred_element_type=jnp.float32)
    carried = jnp.where((documents == 0)[..., None, None], carried.reshape(query.shape), 0.0)
    out = (own.out.astype(jnp.float32) + carried).astype(value.dtype)
    return LinearAttentionOutput(out, context.of_last_part(goes_on * before + added))


def _shape(
    query: Array, key: Array, value: Array, initial_state: Array | None, feature_map: FeatureMap, key_lag: int
) -> LinearAttentionShape:
    """The sizes on one device, of rows that are one document each."""
    batch, tokens, heads, head_dim = query.shape
    key_heads = key.shape[2]
    if key.shape != (batch, tokens, key_heads, head_dim) or value.shape != key.shape:
        raise ValueError(
            f"key and value must be [B, T, K, H] to query's [B, T, N, H]: got {key.shape} and {value.shape} to "
            f"{query.shape}"
        )
    rows = dispatch.rows_of_device(batch)
    initial_rows = initial_heads = 0
    if initial_state is not None:
        states, initial_heads, *matrix = initial_state.shape
        if states not in (1, batch) or initial_heads not in (key_heads, heads) or matrix != [2 * head_dim, head_dim]:
            raise ValueError(
                f"initial_state must be ({batch} or 1, {heads} or {key_heads}, {2 * head_dim}, {head_dim}), got "
                f"{initial_state.shape}"
            )
        initial_rows = 1 if states == 1 else rows
    return LinearAttentionShape(
        rows,
        tokens,
        heads,
        key_heads,
        head_dim,
        value.dtype.name,
        feature_map,
        key_lag=key_lag,
        initial_rows=initial_rows,
        initial_heads=initial_heads,
    )
