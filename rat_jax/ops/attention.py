"""Softmax attention under the visibility rules of this project, in memory linear in the number of tokens."""

from typing import Literal

from pallas_kernels.attention import select
from pallas_kernels.attention.shape import AttentionShape
from rat_jax.ops import attention_kernels, attention_part, attention_xla, context, cut, dispatch, platform
from rat_jax.ops.attention_types import AttentionOutput, KeyInfo
from rat_jax.segments import SegmentInfo, as_segments
from rat_jax.shapes import Array, Float, Int

__all__ = ["AttentionImplementation", "AttentionOutput", "KeyInfo", "attention"]

AttentionImplementation = Literal["xla", "cudnn", "mosaic_gpu", "triton", "pallas_tpu"]
_FASTEST_FIRST = ("cudnn", "mosaic_gpu", "triton", "pallas_tpu")
# Where heads share key heads, in a short window.
_SHARED_KEYS_FASTEST_FIRST = ("mosaic_gpu", "cudnn", "triton", "pallas_tpu")
_SHORT_WINDOW = 1024


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    segment_ids: Int[Array, "B T"] | SegmentInfo | None = None,
    window: int | None = None,
    query_info: KeyInfo | None = None,
    key_info: KeyInfo | None = None,
    aligned: bool = False,
    implementation: AttentionImplementation | None = None,
) -> AttentionOutput:
    """out_t = sum_s p_ts v_s, p_t = softmax over the visible s of q_t . k_s / sqrt(H) (arXiv 1706.03762, 2305.13245).

    Key s is visible to query t when both belong to the same document and 0 <= index_t - index_s (<= `window` where one
    is given), with the token indices of the row. Without `query_info` and `key_info` this is causal self-attention.
    Scores and softmax are float32; the result has the dtype of `value`. Head n reads key head n // (N / K). In plain
    XLA queries are taken in blocks, and the backward pass computes each block's scores again, so that memory grows with
    T + S, not with T S.

    Args:
      query, key, value: q, k, v, of float32, bfloat16 or float16.
      segment_ids: of the tokens that are queries and keys: 0 is padding, which sees nothing and is not seen; neighbours
        of the same other value are one document. None: each row is one document.
      window: a query sees itself and so many earlier tokens; None is all of them.
      query_info, key_info: in place of `segment_ids`, where keys are others than the queries' own: those of a cache.
      aligned: promises of `query_info` and `key_info` that the last T keys are those of the T queries in the same
        order, so that a window needs only the keys near a block of queries. Kernels want it of rows that are not whole.
      implementation: None takes the kernel for the platform that the program is lowered for, where it takes the call,
        and "xla" elsewhere: of 16-bit numbers "cudnn" on CUDA for whole rows, and "mosaic_gpu" on Hopper GPUs for
        documents and padding and in windows to 1,024 whose key heads are shared, and "triton" on CUDA for one query a
        row and the keys of a cache; on TPU "pallas_tpu", JAX's splash attention, for rows.

    Raises:
      ValueError: if N is not a multiple of K, or if arguments do not fit each other.
      UnsupportedError: if a named implementation cannot run the call; the message says why and what comes nearest.
    """
    dispatch.check_implementation(implementation, AttentionImplementation)
    dispatch.check_floating(query=query, key=key, value=value)
    dispatch.check_heads(query=query, key=key, value=value)
    if window is not None:
        dispatch.check_whole(0, window=window)
    batch, tokens, heads, head_dim = query.shape
    key_heads = key.shape[2]
    if key.shape != (batch, key.shape[1], key_heads, head_dim) or value.shape != key.shape or not query.size:
        raise ValueError(
            f"key and value must be [B, S, K, H] to query's [B, T, N, H], none of them empty: got {key.shape} and "
            f"{value.shape} to {query.shape}"
        )
    if heads % key_heads:
        raise ValueError(f"query heads must be a multiple of key heads, got {heads} and {key_heads}")
    if (query_info is None) != (key_info is None) or (query_info is not None and segment_ids is not None):
        raise ValueError("give segment_ids, or query_info and key_info together, or none of them")
    if query_info is None:
        if key.shape[1] != tokens:
            raise ValueError(f"{key.shape[1]} keys to {tokens} queries need query_info and key_info")
        query_info = key_info = KeyInfo.of(as_segments(segment_ids, (batch, tokens)))
        aligned = True
    if cut.is_cut():
        if not aligned or key.shape[1] != tokens:
            cut.refuse_state("a key_info of other tokens than the queries'", key_info)
        options = {"window": window, "aligned": True, "implementation": implementation}
        return AttentionOutput(
            *cut.run(
                lambda q, k, v, info: tuple(attention(q, k, v, query_info=info, key_info=info, **options)),
                ("BTN", "BTN", "BTN", "BT"),
                ("BTN", "BTN"),
                query,
                key,
                value,
                query_info,
            )
        )
    whole_rows = query_info.contiguous and key_info.contiguous and key.shape[1] == tokens
    own_keys = whole_rows or (aligned and key.shape[1] == tokens)
    shape = AttentionShape(
        dispatch.rows_of_device(batch),
        tokens,
        heads,
        key_heads,
        head_dim,
        query.dtype.name,
        window=None if own_keys and window is not None and window >= tokens - 1 else window,
        own_keys=own_keys,
        whole_rows=whole_rows,
        capability=platform.expected_capability(),
    )

    def unsupported_reason(name: str) -> str | None:
        if name == "mosaic_gpu" and context.num_parts() > 1:
            return 'rows must not be cut along the context axis; the nearest is "cudnn", of whole rows'
        return dispatch.differing_dtypes(query, key, value) or select.unsupported_reason(name, shape)

    shares_keys = heads > key_heads and window is not None and window <= _SHORT_WINDOW
    order = _SHARED_KEYS_FASTEST_FIRST if shares_keys else _FASTEST_FIRST
    if query.dtype.itemsize > 2:  # whose products, of 16 heads or more, no matrix units take
        order = tuple(name for name in order if name != "triton")
    chosen = dispatch.choose(implementation, order, batch, unsupported_reason)
    if aligned and context.num_parts() > 1 and window != 0:  # which sees no other part
        if chosen == "xla" and window is not None:
            return attention_part.attend(query, key, value, query_info, window)
        kernel = attention_part.AttendPart(chosen, shape, window)
        fall_back = implementation is None and chosen != "xla"
        return AttentionOutput(*dispatch.run(kernel, fall_back, query, key, value, query_info))
    if chosen == "xla":
        return attention_xla.attend(query, key, value, query_info, key_info, window, aligned)
    if chosen == "triton":
        one = attention_kernels.AttendOne(chosen, shape)
        return AttentionOutput(*dispatch.run(one, implementation is None, query, key, value, query_info, key_info))
    kernel = attention_kernels.Attend(chosen, shape)
    info = None if shape.whole_rows else query_info
    return AttentionOutput(*dispatch.run(kernel, implementation is None, query, key, value, info))
