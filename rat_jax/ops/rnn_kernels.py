"""The RNN mixing op by kernels, as `dispatch` runs them."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from pallas_kernels.rnn.shape import RnnShape
from rat_jax.ops import dispatch, rnn_xla
from rat_jax.ops.rnn_types import RnnOutput
from rat_jax.segments import SegmentInfo
from rat_jax.shapes import Array, Int


@dataclasses.dataclass(frozen=True)
class Mix(dispatch.Kernel):
    """Of `projected`, `gate_bias` and segments: the mixed tokens, of rows that continue from no state."""

    implementation: str
    shape: RnnShape
    replicated: ClassVar[tuple[int, ...]] = (1,)
    num_differentiated: ClassVar[int] = 2

    def forward(self, projected: Array, gate_bias: Array, segments: SegmentInfo) -> tuple[tuple[Array], Any]:
        from pallas_kernels.rnn import triton  # imports Triton, which machines without a GPU may lack

        kinds = _kinds(self.shape, segments)
        out, residuals, _ = triton.rnn_forward(self.shape, projected, gate_bias.astype(jnp.float32), kinds, None)
        return (out,), residuals

    def plain(self, projected: Array, gate_bias: Array, segments: SegmentInfo) -> tuple[Array]:
        return (rnn_xla.mix(projected, gate_bias, segments).out,)

    def backward(self, arguments, saved, residuals, d_results) -> tuple[Array, Array]:
        from pallas_kernels.rnn import triton

        projected, gate_bias, segments = arguments
        (d_out,), kinds = d_results, _kinds(self.shape, segments)
        arrays = residuals, projected, gate_bias.astype(jnp.float32), d_out, kinds
        return triton.rnn_backward(self.shape, *arrays)


@dataclasses.dataclass(frozen=True)
class Extend(dispatch.Kernel):
    """Of `projected`, `gate_bias`, segments and a state: the mixed tokens that follow it, and the state after them."""

    implementation: str
    shape: RnnShape
    replicated: ClassVar[tuple[int, ...]] = (1,)
    num_differentiated: ClassVar[int] = 0

    def forward(
        self, projected: Array, gate_bias: Array, segments: SegmentInfo, state: Array
    ) -> tuple[tuple[Array, Array], None]:
        from pallas_kernels.rnn import triton

        arrays = projected, gate_bias.astype(jnp.float32), _kinds(self.shape, segments), state
        out, _, last = triton.rnn_forward(self.shape, *arrays)
        return (out, last), None

    def plain(self, projected: Array, gate_bias: Array, segments: SegmentInfo, state: Array) -> tuple[Array, Array]:
        return tuple(rnn_xla.mix(projected, gate_bias, segments, state))


def mix(
    implementation: str,
    fall_back: bool,
    shape: RnnShape,
    projected: Array,
    gate_bias: Array,
    segments: SegmentInfo,
    state: Array | None,
) -> RnnOutput:
    """See `rat_jax.ops.rnn.rnn_mix`; `fall_back` is that of `dispatch.run`."""
    if state is not None:
        return RnnOutput(*dispatch.run(Extend(implementation, shape), fall_back, projected, gate_bias, segments, state))
    return RnnOutput(*dispatch.run(Mix(implementation, shape), fall_back, projected, gate_bias, segments), None)


def _kinds(shape: RnnShape, segments: SegmentInfo) -> Int[Array, "B T"] | None:
    """What the kernels read of documents and padding."""
    if not shape.segmented:
        return None
    return jnp.where(segments.is_token, segments.starts().astype(jnp.int32), 2)
