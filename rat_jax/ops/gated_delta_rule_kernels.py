"""The gated delta rule by kernels, as `dispatch` runs them."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule.shape import GatedDeltaRuleShape
from rat_jax.ops import dispatch, gated_delta_rule_xla
from rat_jax.shapes import Array


@dataclasses.dataclass(frozen=True)
class Rule(dispatch.Kernel):
    """Of query, key, value, log decay, write strength, initial state and starts: what queries read, and the last state.

    The last two arguments may be None.
    """

    implementation: str
    shape: GatedDeltaRuleShape
    replicated: ClassVar[tuple[int, ...]] = ()
    num_differentiated: ClassVar[int] = 6

    def forward(self, *arguments: Array | None) -> tuple[tuple[Array, Array], tuple[()]]:
        from pallas_kernels.gated_delta_rule import triton  # imports Triton, which machines without a GPU may lack

        return triton.gated_delta_rule_forward(self.shape, *_of_kernels(*arguments)), ()

    def plain(self, *arguments: Array | None) -> tuple[Array, Array]:
        return tuple(gated_delta_rule_xla.rule(*arguments, self.shape.chunk_size))

    def backward(self, arguments, saved, residuals, d_results) -> tuple[Array | None, ...]:
        from pallas_kernels.gated_delta_rule import triton

        # What it computes again is not to be taken from the forward pass, which would keep it until then.
        arguments, d_results = jax.lax.optimization_barrier((arguments, d_results))
        *gradients, d_initial = triton.gated_delta_rule_backward(self.shape, *_of_kernels(*arguments), *d_results)
        return *gradients, d_initial if self.shape.continued else None


@dataclasses.dataclass(frozen=True)
class Step(dispatch.Kernel):
    """As `Rule`, of one token a row and an initial state, which is updated in place where it is donated."""

    implementation: str
    shape: GatedDeltaRuleShape
    replicated: ClassVar[tuple[int, ...]] = ()
    num_differentiated: ClassVar[int] = 0

    def forward(self, *arguments: Array | None) -> tuple[tuple[Array, Array], None]:
        from pallas_kernels.gated_delta_rule import triton_step  # imports Triton, which machines without a GPU may lack

        *of_token, state, starts = arguments
        goes_on = jnp.ones(state.shape[:1], bool) if starts is None else ~starts[:, 0]
        return triton_step.step(self.shape, *of_token, goes_on, state), None

    def plain(self, *arguments: Array | None) -> tuple[Array, Array]:
        return tuple(gated_delta_rule_xla.rule(*arguments, self.shape.chunk_size))


def _of_kernels(*arguments: Array | None) -> tuple[Array | None, ...]:
    """Arguments as kernels take them, who read whole numbers."""
    *of_tokens, initial_state, starts = arguments
    return *of_tokens, None if starts is None else starts.astype(jnp.int32), initial_state
