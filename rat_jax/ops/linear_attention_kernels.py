"""Linear attention by kernels, as `dispatch` runs them."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from pallas_kernels.linear_attention import select
from pallas_kernels.linear_attention.shape import LinearAttentionShape
from rat_jax.ops import dispatch, linear_attention_xla
from rat_jax.shapes import Array


@dataclasses.dataclass(frozen=True)
class Attend(dispatch.Kernel):
    """Of query, key, value, initial state and document numbers: what queries read, and the sum over the last document.

    The last two arguments may be None.
    """

    implementation: str
    shape: LinearAttentionShape
    replicated: tuple[int, ...]  # the initial state, where all rows share it
    num_differentiated: ClassVar[int] = 4

    def forward(
        self, query: Array, key: Array, value: Array, initial_state: Array | None, documents: Array | None
    ) -> tuple[tuple[Array, Array], Any]:
        forward = select.kernels(self.implementation).linear_attention_forward
        out, state, residuals = forward(self.shape, query, key, value, initial_state, documents)
        return (out, state), residuals

    def plain(
        self, query: Array, key: Array, value: Array, initial_state: Array | None, documents: Array | None
    ) -> tuple[Array, Array]:
        arrays = (query, key, value, initial_state, documents)
        return tuple(linear_attention_xla.attend(self.shape.feature_map, self.shape.key_lag, *arrays))

    def backward(self, arguments, saved, residuals, d_results) -> tuple[Array, Array, Array, Array | None]:
        del saved
        query, key, value, initial_state, documents = arguments
        backward = select.kernels(self.implementation).linear_attention_backward
        return backward(self.shape, residuals, query, key, value, *d_results, initial_state, documents)


@dataclasses.dataclass(frozen=True)
class Step(dispatch.Kernel):
    """Of query, key and value of one token a row, document numbers, initial state and state: output and state.

    Document numbers and initial state may be None. The state is updated in place where it is donated.
    """

    implementation: str
    shape: LinearAttentionShape
    replicated: tuple[int, ...]  # the initial state, where all rows share it
    num_differentiated: ClassVar[int] = 0

    def forward(
        self,
        query: Array,
        key: Array,
        value: Array,
        documents: Array | None,
        initial_state: Array | None,
        state: Array,
    ) -> tuple[tuple[Array, Array], None]:
        from pallas_kernels.linear_attention import triton_step  # imports Triton, which machines without a GPU may lack

        goes_on = jnp.ones(query.shape[:1], bool) if documents is None else documents[:, 0] == 0
        return triton_step.step(self.shape, query, key, value, goes_on, initial_state, state), None

    def plain(
        self,
        query: Array,
        key: Array,
        value: Array,
        documents: Array | None,
        initial_state: Array | None,
        state: Array,
    ) -> tuple[Array, Array]:
        arrays = (query, key, value, initial_state, documents, state)
        return tuple(linear_attention_xla.attend(self.shape.feature_map, 0, *arrays))
