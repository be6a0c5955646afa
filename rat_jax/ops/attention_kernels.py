"""Softmax attention by kernels, as `dispatch` runs them: of tokens to those of their own rows, and to a cache."""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp

from pallas_kernels.attention import cudnn_fmha
from pallas_kernels.attention.shape import AttentionShape
from rat_jax.ops import attention_xla, dispatch
from rat_jax.ops.attention_types import KeyInfo
from rat_jax.shapes import Array


@dataclasses.dataclass(frozen=True)
class Attend(dispatch.Kernel):
    """Of query, key, value and what is known of the tokens: the output and the log-sum-exp.

    The last argument is None where each row is one document.
    """

    implementation: str
    shape: AttentionShape
    replicated: ClassVar[tuple[int, ...]] = ()
    num_differentiated: ClassVar[int] = 3
    saved_results: ClassVar[tuple[int, ...]] = (0, 1)
    without_gradient: ClassVar[tuple[int, ...]] = (1,)  # no mixer wants that of the log-sum-exp

    def forward(self, query: Array, key: Array, value: Array, info: KeyInfo | None) -> tuple[tuple[Array, Array], None]:
        match self.implementation:
            case "pallas_tpu":
                from pallas_kernels.attention import tpu_splash  # imports Pallas, which takes a while

                return tpu_splash.forward(query, key, value, _documents(info), **self._options()), None
            case "mosaic_gpu":
                from pallas_kernels.attention import mosaic_gpu

                return mosaic_gpu.forward(self.shape, query, key, value, _documents(info), **self._options()), None
            case _:
                out, log_sum_exp = cudnn_fmha.forward(query, key, value, **self._options())
                return (out, log_sum_exp.transpose(0, 2, 1)), None

    def plain(self, query: Array, key: Array, value: Array, info: KeyInfo | None) -> tuple[Array, Array]:
        if info is None:
            return tuple(attention_xla.attend_whole_rows(query, key, value, self.shape.window))
        return tuple(attention_xla.attend(query, key, value, info, info, self.shape.window, aligned=True))

    def backward(self, arguments, saved, residuals, d_results) -> tuple[Array, Array, Array]:
        del residuals
        *arrays, info = arguments
        out, log_sum_exp = saved
        d_out, _ = d_results
        match self.implementation:
            case "pallas_tpu":
                from pallas_kernels.attention import tpu_splash

                return tpu_splash.backward(*arrays, _documents(info), out, log_sum_exp, d_out, **self._options())
            case "mosaic_gpu":
                from pallas_kernels.attention import mosaic_gpu

                kept = _documents(info), out, log_sum_exp, d_out
                return mosaic_gpu.backward(self.shape, *arrays, *kept, **self._options())
            case _:
                return cudnn_fmha.backward(*arrays, out, log_sum_exp.transpose(0, 2, 1), d_out, **self._options())

    def _options(self) -> dict[str, float | int | None]:
        return {"scale": 1 / math.sqrt(self.shape.head_dim), "window": self.shape.window}


@dataclasses.dataclass(frozen=True)
class AttendOne(dispatch.Kernel):
    """Of one query a row, the keys and values of a cache, and what is known of either: output and log-sum-exp.

    Made for decoding, so that gradients are plain XLA's.
    """

    implementation: str
    shape: AttentionShape
    replicated: ClassVar[tuple[int, ...]] = ()
    num_differentiated: ClassVar[int] = 0

    def forward(
        self, query: Array, key: Array, value: Array, query_info: KeyInfo, key_info: KeyInfo
    ) -> tuple[tuple[Array, Array], None]:
        from pallas_kernels.attention import triton_decode  # imports Triton, which machines without a GPU may lack

        places = (
            (info.segment_ids.astype(jnp.int32), info.token_index.astype(jnp.int32)) for info in (query_info, key_info)
        )
        visible = attention_xla.visible(query_info, key_info, self.shape.window)[:, 0]
        return triton_decode.attend(self.shape, query, key, value, *places, visible), None

    def plain(
        self, query: Array, key: Array, value: Array, query_info: KeyInfo, key_info: KeyInfo
    ) -> tuple[Array, Array]:
        return tuple(attention_xla.attend(query, key, value, query_info, key_info, self.shape.window, aligned=False))


def _documents(info: KeyInfo | None) -> Array | None:
    return None if info is None else info.segment_ids
