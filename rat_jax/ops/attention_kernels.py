"""Causal softmax attention of whole rows by kernels, as `dispatch` runs them."""

import dataclasses
import math
from typing import ClassVar

from pallas_kernels.attention import cudnn_fmha
from pallas_kernels.attention.shape import AttentionShape
from rat_jax.ops import attention_xla, dispatch
from rat_jax.shapes import Array


@dataclasses.dataclass(frozen=True)
class Attend(dispatch.Kernel):
    """Of query, key and value: the output and the log-sum-exp, by cuDNN."""

    implementation: str
    shape: AttentionShape
    window: int | None
    replicated: ClassVar[tuple[int, ...]] = ()
    num_differentiated: ClassVar[int] = 3
    saved_results: ClassVar[tuple[int, ...]] = (0, 1)
    without_gradient: ClassVar[tuple[int, ...]] = (1,)  # no mixer wants that of the log-sum-exp

    def forward(self, query: Array, key: Array, value: Array) -> tuple[tuple[Array, Array], None]:
        out, log_sum_exp = cudnn_fmha.forward(query, key, value, **self._options())
        return (out, log_sum_exp.transpose(0, 2, 1)), None

    def plain(self, query: Array, key: Array, value: Array) -> tuple[Array, Array]:
        return tuple(attention_xla.attend_whole_rows(query, key, value, self.window))

    def backward(self, arguments, saved, residuals, d_results) -> tuple[Array, Array, Array]:
        del residuals
        out, log_sum_exp = saved
        d_out, _ = d_results
        return cudnn_fmha.backward(*arguments, out, log_sum_exp.transpose(0, 2, 1), d_out, **self._options())

    def _options(self) -> dict[str, float | int | None]:
        reaches_all = self.window is not None and self.window >= self.shape.tokens - 1
        return {"scale": 1 / math.sqrt(self.shape.head_dim), "window": None if reaches_all else self.window}
