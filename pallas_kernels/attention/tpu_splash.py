"""JAX's splash attention on TPU (arXiv 2205.14135 with masks by blocks): the one place that knows its calls and blocks.

Two things are not taken from its public entry. It evaluates the mask for every block of [T, T] in NumPy, minutes at
131,072 tokens: `tpu_tiling` says which blocks are seen. Its derivative keeps what it needs to itself: here the forward
call returns the log-sum-exp too, and the backward pass is called with it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from pallas_kernels.attention import tpu_tiling
from pallas_kernels.launch.sizes import SEES_NOTHING, cdiv

FORWARD_KERNELS = ("splash_mha_fwd",)
BACKWARD_KERNELS = ("splash_mha_dq", "splash_mha_dkv")


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    documents: jax.Array | None,
    *,
    scale: float,
    window: int | None = None,
    key_documents: jax.Array | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """out_t = sum_s p_ts v_s, p_t the softmax of scale q_t . k_s over s <= t of one document, and its log-sum-exp.

    Args:
      query: [B, T, N, H]; head n reads key head n // (N / K).
      key, value: [B, S, K, H]; S = T but where `key_documents` are given.
      documents: whole numbers [B, T]; 0 is padding, which sees nothing; None: each row is one document.
      scale: of the scores.
      window: a query sees itself and so many earlier keys; None is all of them.
      key_documents: [B, S], of keys that are not the queries' own and come before all of them; then there are
        `documents` and no `window`.
      interpret: run without a TPU, as `pallas_call` means it.

    Returns:
      [B, T, N, H] in the dtype of `query`, zero where no key is seen, and float32 [B, T, N], very negative there.
    """
    call = _Call.of(query, key, window, key_documents is not None)
    kernel = call.kernel(interpret)
    arrays = call.queries(_scaled(query, scale)), call.keys(key), call.keys(value)
    with _precision(query):
        out, (log_sum_exp,) = jax.vmap(kernel)(*arrays, call.segments(documents, key_documents))
    out, log_sum_exp = (_tokens_first(x, query.shape[1]) for x in (out, log_sum_exp))
    if documents is None:
        return out, log_sum_exp
    sees = (documents != 0)[..., None] & (log_sum_exp > SEES_NOTHING)
    return jnp.where(sees[..., None], out, 0), jnp.where(sees, log_sum_exp, SEES_NOTHING)


def backward(
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
    key_documents: jax.Array | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of query, key and value from that of `out`, each in its own shape and dtype.

    Args:
      query, key, value, documents, scale, window, key_documents, interpret: see `forward`.
      out, log_sum_exp: what `forward` gave.
      d_out: [B, T, N, H].
    """
    call = _Call.of(query, key, window, key_documents is not None)
    if documents is not None:  # exp(score - log_sum_exp) is then 0 for what padding sees
        log_sum_exp = jnp.where((documents != 0)[..., None], log_sum_exp, -SEES_NOTHING)
    kernel = call.kernel(interpret)

    def gradients(query, key, value, out, log_sum_exp, d_out, segments):
        kept = (query, key, value, segments, None, out, log_sum_exp, kernel.dq_mask_info, kernel.dkv_mask_info)
        return splash._splash_attention_bwd(**kernel.kwargs, res=kept, do=d_out)[3:6]

    rows = (call.queries(x) for x in (out, log_sum_exp, d_out))
    arrays = call.queries(_scaled(query, scale)), call.keys(key), call.keys(value), *rows
    with _precision(query):
        d_query, d_key, d_value = jax.vmap(gradients)(*arrays, call.segments(documents, key_documents))
    d_key, d_value = (_tokens_first(x, key.shape[1]) for x in (d_key, d_value))
    return _scaled(_tokens_first(d_query, query.shape[1]), scale), d_key, d_value


@dataclasses.dataclass(frozen=True)
class _Visible:
    """Whether queries see keys, by their places in the row; documents are compared beside it."""

    window: int | None

    def __call__(self, query: jax.Array, key: jax.Array) -> jax.Array:
        visible = query >= key
        return visible if self.window is None else visible & (query - key <= self.window)


@dataclasses.dataclass(frozen=True)
class _Call:
    """How a call is cut, and its arrays as the kernels see them."""

    tokens: int
    block: int  # queries of a step
    key_block: int
    window: int | None
    sees_all: bool  # keys are not the queries' own

    @classmethod
    def of(cls, query: jax.Array, key: jax.Array, window: int | None, sees_all: bool) -> "_Call":
        blocks = (tpu_tiling.block_size(x.shape[1]) for x in (query, key))
        return cls(query.shape[1], *blocks, window, sees_all)

    def kernel(self, interpret: bool) -> splash.SplashAttentionKernel:
        by_queries = {f"block_{name}": self.block for name in ("q", "q_dkv", "q_dq")}
        by_keys = {
            f"block_{name}": self.key_block for name in ("kv", "kv_compute", "kv_dkv", "kv_dkv_compute", "kv_dq")
        }
        return splash.SplashAttentionKernel(
            *self._mask_infos(),
            block_sizes=splash.BlockSizes(**by_queries, **by_keys),
            is_mqa=False,
            save_residuals=True,
            mask_value=splash.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=None,
            mask_function=None if self.sees_all else _Visible(self.window),
            interpret=interpret,
        )

    def _mask_infos(self) -> list[MaskInfo]:
        if self.sees_all:
            return [MaskInfo(None, None, None, None, None)] * 3
        sizes = (self.tokens, self.window, self.block)
        by_query, by_key = tpu_tiling.steps_of_queries(*sizes), tpu_tiling.steps_of_keys(*sizes)
        places = np.arange(cdiv(self.tokens, self.block) * self.block, dtype=np.int32)
        return [MaskInfo(steps.reads, None, steps.runs, None, places) for steps in (by_query, by_query, by_key)]

    def segments(self, documents: jax.Array | None, key_documents: jax.Array | None) -> splash.SegmentIds | None:
        if documents is None:
            return None
        key_documents = documents if key_documents is None else key_documents
        return splash.SegmentIds(q=_padded(documents, self.block), kv=_padded(key_documents, self.key_block))

    def queries(self, x: jax.Array) -> jax.Array:
        """[B, T, N, ...] to [B, N, T padded, ...]."""
        return jnp.swapaxes(_padded(x, self.block), 1, 2)

    def keys(self, x: jax.Array) -> jax.Array:
        """As `queries`, of keys and values."""
        return jnp.swapaxes(_padded(x, self.key_block), 1, 2)


def _padded(x: jax.Array, block: int) -> jax.Array:
    """Tokens filled up to whole blocks with zeros."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))


def _tokens_first(x: jax.Array, tokens: int) -> jax.Array:
    """[B, N, T padded, ...] to [B, T, N, ...]."""
    return jnp.swapaxes(x[:, :, :tokens], 1, 2)


def _scaled(x: jax.Array, scale: float) -> jax.Array:
    """Rounded once."""
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


def _precision(query: jax.Array):
    """That of products: float32 whole, 16 bits as they are, whatever the user's default."""
    return jax.default_matmul_precision("highest" if query.dtype == jnp.float32 else "default")
