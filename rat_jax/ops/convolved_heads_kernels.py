"""Convolved heads by kernels, as `dispatch` runs them."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from pallas_kernels.convolved_heads.shape import ConvolvedHeadsShape
from rat_jax.ops import convolved_heads_xla, dispatch
from rat_jax.segments import SegmentInfo
from rat_jax.shapes import Array, Int


@dataclasses.dataclass(frozen=True)
class Convolve(dispatch.Kernel):
    """Of `projected`, taps and segments: queries, keys and values of rows that start with these tokens."""

    implementation: str
    shape: ConvolvedHeadsShape
    replicated: ClassVar[tuple[int, ...]] = (1,)
    num_differentiated: ClassVar[int] = 2
    recomputed: ClassVar[bool] = True  # as large as `projected`, from which one pass makes them

    def forward(self, projected: Array, taps: Array, segments: SegmentInfo) -> tuple[tuple[Array, Array, Array], None]:
        from pallas_kernels.convolved_heads import triton  # imports Triton, which machines without a GPU may lack

        return triton.convolved_heads_forward(self.shape, projected, taps, self._positions(segments)), None

    def plain(self, projected: Array, taps: Array, segments: SegmentInfo) -> tuple[Array, Array, Array]:
        heads = convolved_heads_xla.convolve(projected, taps, segments, self.shape.num_heads, self.shape.key_dim)
        return heads.query, heads.key, heads.value

    def backward(self, arguments, saved, residuals, d_results) -> tuple[Array, Array]:
        from pallas_kernels.convolved_heads import triton

        projected, taps, segments = arguments
        return triton.convolved_heads_backward(self.shape, projected, taps, self._positions(segments), *d_results)

    def _positions(self, segments: SegmentInfo) -> Int[Array, "B T"] | None:
        return segments.positions.astype(jnp.int32) if self.shape.segmented else None
