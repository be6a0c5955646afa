"""The RAT mixing op by kernels, as `dispatch` runs them."""

import dataclasses
from typing import Any, ClassVar

import jax

from pallas_kernels.rat.shape import RatShape
from rat_jax.ops import context, dispatch, rat_part, rat_xla
from rat_jax.ops.rat_types import RatOutput, RatState
from rat_jax.segments import SegmentInfo
from rat_jax.shapes import Array


@dataclasses.dataclass(frozen=True)
class Mix(dispatch.Kernel):
    """Of `projected`, `gate_bias` and segments: the mixed tokens, of rows that continue from no state."""

    implementation: str
    shape: RatShape
    replicated: ClassVar[tuple[int, ...]] = (1,)
    num_differentiated: ClassVar[int] = 2
    saved_results: ClassVar[tuple[int, ...]] = (0,)

    def forward(self, projected: Array, gate_bias: Array, segments: SegmentInfo) -> tuple[tuple[Array], Any]:
        documents = _documents(segments)
        match self.implementation:
            case "pallas_tpu":
                from pallas_kernels.rat import tpu

                out, residuals = tpu.rat_forward(self.shape, projected, gate_bias, **documents)
            case gpu:
                from pallas_kernels.rat import triton  # imports Triton, which machines without a GPU may lack

                out, residuals = triton.rat_forward(self.shape, projected, gate_bias, **documents, implementation=gpu)
        return (out,), residuals._replace(out=None)  # saved once, not twice

    def plain(self, projected: Array, gate_bias: Array, segments: SegmentInfo) -> tuple[Array]:
        return (rat_xla.mix(self.shape, projected, gate_bias, segments).out,)

    def backward(self, arguments, saved, residuals, d_results) -> tuple[Array, Array]:
        projected, gate_bias, segments = arguments
        (out,), (d_out,) = saved, d_results
        arrays = (self.shape, residuals._replace(out=out), projected, gate_bias, d_out)
        match self.implementation:
            case "pallas_tpu":
                from pallas_kernels.rat import tpu

                return tpu.rat_backward(*arrays, **_documents(segments))
            case gpu:
                from pallas_kernels.rat import triton

                return triton.rat_backward(*arrays, implementation=gpu)


@dataclasses.dataclass(frozen=True)
class Extend(dispatch.Kernel):
    """Of `projected`, `gate_bias`, segments and a state: the mixed tokens that follow it, and the state after them.

    The state is updated in place where it is donated.
    """

    implementation: str
    shape: RatShape
    replicated: ClassVar[tuple[int, ...]] = (1,)
    num_differentiated: ClassVar[int] = 0

    def forward(
        self, projected: Array, gate_bias: Array, segments: SegmentInfo, state: RatState
    ) -> tuple[tuple[Array, RatState], None]:
        from pallas_kernels.rat.state import State
        from pallas_kernels.rat.triton import rat_extend
        from pallas_kernels.rat.triton_decode import rat_decode

        before = State(state.key, state.value, state.summary_key, state.summary_value)
        first_slots = segments.first_slots(self.shape.chunk_size)
        arguments = self.shape, projected, gate_bias, before, segments.segment_ids, segments.positions, first_slots
        if self.shape.tokens == 1:
            out, after = rat_decode(*arguments)
        else:
            held = segments.held(state.summary_key.shape[1], self.shape.chunk_size)
            out, after = rat_extend(*arguments, held, implementation=self.implementation)
        return (out, RatState(*after)), None

    def plain(
        self, projected: Array, gate_bias: Array, segments: SegmentInfo, state: RatState
    ) -> tuple[Array, RatState]:
        return tuple(rat_xla.mix(self.shape, projected, gate_bias, segments, state))


def _documents(segments: SegmentInfo) -> dict[str, jax.Array]:
    return {} if segments.contiguous else {"segment_ids": segments.segment_ids, "positions": segments.positions}


def mix(
    implementation: str,
    fall_back: bool,
    shape: RatShape,
    projected: Array,
    gate_bias: Array,
    segments: SegmentInfo,
    state: RatState | None,
) -> RatOutput:
    """See `rat_jax.ops.rat.rat_mix`; `fall_back` is that of `dispatch.run`."""
    if state is not None:
        return RatOutput(*dispatch.run(Extend(implementation, shape), fall_back, projected, gate_bias, segments, state))
    kernel = Mix(implementation, shape) if context.num_parts() == 1 else rat_part.MixPart(implementation, shape)
    return RatOutput(*dispatch.run(kernel, fall_back, projected, gate_bias, segments), None)
