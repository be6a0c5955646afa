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
from pallas_kernels.launch.sizes import cdiv

FORWARD_KERNELS = ("splash_mha_fwd",)
BACKWARD_KERNELS = ("splash_mha_dq", "splash_mha_dkv")
_SEES_NOTHING = -1e30  # log-sum-exp of padding


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    documents: jax.Array | None,
    *,
    scale: float,
    window: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """out_t = sum_s p_ts v_s, p_t the softmax of scale q_t . k_s over s <= t of one document, and its log-sum-exp.

    Args:
      query: [B, T, N, H]; head n reads key head n // (N / K).
      key, value: [B, T, K, H].
      documents: whole numbers [B, T]; 0 is padding, which sees nothing; None: each row is one document.
      scale: of the scores.
      window: a query sees itself and so many earlier keys; None is all of them.
      interpret: run without a TPU, as `pallas_call` means it.

    Returns:
      [B, T, N, H] in the dtype of `query`, zero for padding, and float32 [B, T, N], very negative for padding.
    """
    call = _Call.of(query, window)
    kernel = call.kernel(interpret)
    arrays = [call.heads_first(x) for x in (_scaled(query, scale), key, value)]
    with _precision(query):
        out, (log_sum_exp,) = jax.vmap(kernel)(*arrays, call.segments(documents))
    out, log_sum_exp = call.tokens_first(out), call.tokens_first(log_sum_exp)
    if documents is None:
        return out, log_sum_exp
    is_token = (documents != 0)[..., None]
    return jnp.where(is_token[..., None], out, 0), jnp.where(is_token, log_sum_exp, _SEES_NOTHING)


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
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of query, key and value from that of `out`, each in its own shape and dtype.

    Args:
      query, key, value, documents, scale, window, interpret: see `forward`.
      out, log_sum_exp: what `forward` gave.
      d_out: [B, T, N, H].
    """
    call = _Call.of(query, window)
    if documents is not None:  # exp(score - log_sum_exp) is then 0 for what padding sees
        log_sum_exp = jnp.where((documents != 0)[..., None], log_sum_exp, -_SEES_NOTHING)
    kernel = call.kernel(interpret)

    def gradients(query, key, value, out, log_sum_exp, d_out, segments):
        kept = (query, key, value, segments, None, out, log_sum_exp, kernel.dq_mask_info, kernel.dkv_mask_info)
        return splash._splash_attention_bwd(**kernel.kwargs, res=kept, do=d_out)[3:6]

    arrays = [call.heads_first(x) for x in (_scaled(query, scale), key, value, out, log_sum_exp, d_out)]
    with _precision(query):
        d_query, d_key, d_value = jax.vmap(gradients)(*arrays, call.segments(documents))
    return _scaled(call.tokens_first(d_query), scale), call.tokens_first(d_key), call.tokens_first(d_value)


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
    block: int
    window: int | None

    @classmethod
    def of(cls, query: jax.Array, window: int | None) -> "_Call":
        tokens = query.shape[1]
        return cls(tokens, tpu_tiling.block_size(tokens), window)

    def kernel(self, interpret: bool) -> splash.SplashAttentionKernel:
        sizes = (self.tokens, self.window, self.block)
        by_query, by_key = tpu_tiling.steps_of_queries(*sizes), tpu_tiling.steps_of_keys(*sizes)
        places = np.arange(cdiv(self.tokens, self.block) * self.block, dtype=np.int32)
        infos = [MaskInfo(steps.reads, None, steps.runs, None, places) for steps in (by_query, by_query, by_key)]
        names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
        return splash.SplashAttentionKernel(
            *infos,
            block_sizes=splash.BlockSizes(**{f"block_{name}": self.block for name in names}),
            is_mqa=False,
            save_residuals=True,
            mask_value=splash.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=None,
            mask_function=_Visible(self.window),
            interpret=interpret,
        )

    def segments(self, documents: jax.Array | None) -> splash.SegmentIds | None:
        if documents is None:
            return None
        ids = jnp.pad(documents.astype(jnp.int32), [(0, 0), (0, -self.tokens % self.block)])
        return splash.SegmentIds(q=ids, kv=ids)

    def heads_first(self, x: jax.Array) -> jax.Array:
        """[B, T, N, ...] to [B, N, T padded, ...]."""
        x = jnp.pad(x, [(0, 0), (0, -self.tokens % self.block)] + [(0, 0)] * (x.ndim - 2))
        return jnp.swapaxes(x, 1, 2)

    def tokens_first(self, x: jax.Array) -> jax.Array:
        """[B, N, T padded, ...] to [B, T, N, ...]."""
        return jnp.swapaxes(x[:, :, : self.tokens], 1, 2)


def _scaled(x: jax.Array, scale: float) -> jax.Array:
    """Rounded once."""
    return (x.astype(jnp.float32) * scale).astype(x.dtype)


def _precision(query: jax.Array):
    """That of products: float32 whole, 16 bits as they are, whatever the user's default."""
    return jax.default_matmul_precision("highest" if query.dtype == jnp.float32 else "default")
