"""The RNN mixing op by Triton kernels (arXiv 2507.04416): forward and backward on one device, for GPUs.

`projected` [B, T, 3 D] holds z, v, g of D channels each. With f = sigmoid(g + gate_bias):

    h_t = f_t h_{t-1} + (1 - f_t) v_t,    out_t = sigmoid(z_t) h_t,    h in float32.

Rows are cut into S spans where rows and channels alone are too few to fill a card. `rnn_spans_forward` then finds what
each span makes of the state before it, and `rnn_forward` runs through all of them at once; likewise
`rnn_spans_backward` and `rnn_backward`. Lowered text shows the names.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.launch import triton as launcher
from pallas_kernels.rnn import triton_backward, triton_forward
from pallas_kernels.rnn.shape import RnnShape
from pallas_kernels.rnn.triton_tiling import span_of


def rnn_forward(
    shape: RnnShape,
    projected: jax.Array,
    gate_bias: jax.Array,
    kinds: jax.Array | None,
    initial_state: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The mixed output [B, T, D] in the dtype of `projected`, what `rnn_backward` needs, and the last state [B, D].

    Args:
      shape: sizes for which `triton_tiling.unsupported_reason` has no reason.
      projected: [B, T, 3 D], bfloat16, float16 or float32.
      gate_bias: [D] float32.
      kinds: [B, T] int32, where `segmented`: 1 begins a document, 2 is padding, which leaves the state, 0 any other.
      initial_state: [B, D] float32, before the first token; None: zero.
    """
    return forward(launcher.run, shape, projected, gate_bias, kinds, initial_state, span_of(shape))


def rnn_backward(
    shape: RnnShape,
    piece_states: jax.Array,
    projected: jax.Array,
    gate_bias: jax.Array,
    d_out: jax.Array,
    kinds: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The gradients of `projected` (in its dtype) and of `gate_bias` (float32) from `d_out`; see `rnn_forward`."""
    arrays = projected, gate_bias, d_out.astype(projected.dtype), kinds
    d_projected, d_bias = backward(launcher.run, shape, piece_states, *arrays, span_of(shape))
    return d_projected, jnp.sum(d_bias, axis=(0, 1))


def forward(
    run: launcher.Run, shape: RnnShape, projected, gate_bias, kinds, initial_state, span: int, arrays: Any = jnp
) -> tuple[Any, Any, Any]:
    """The forward kernels through `run`, on the arrays of whatever library it runs them with."""
    if initial_state is None:
        initial_state = arrays.zeros((shape.batch, shape.width), dtype=arrays.float32)
    inputs = projected, gate_bias, _placeholder(arrays) if kinds is None else kinds
    states = [initial_state]
    if span < shape.tokens:
        decays, ends = run(triton_forward.spans_launch(shape, span), *inputs)
        for s in range(decays.shape[1] - 1):
            states.append(decays[:, s] * states[-1] + ends[:, s])
    return tuple(run(triton_forward.forward_launch(shape, span), *inputs, arrays.stack(states, 1)))


def backward(
    run: launcher.Run, shape: RnnShape, piece_states, projected, gate_bias, d_out, kinds, span: int, arrays: Any = jnp
) -> tuple[Any, Any]:
    """The backward kernels through `run`; the bias gradient is left as partial sums [B, S, D]."""
    inputs = projected, gate_bias, _placeholder(arrays) if kinds is None else kinds, d_out
    after = [arrays.zeros((shape.batch, shape.width), dtype=arrays.float32)]
    if span < shape.tokens:
        decays, ends = run(triton_backward.spans_launch(shape, span), *inputs)
        for s in range(decays.shape[1] - 1, 0, -1):
            after.append(decays[:, s] * after[-1] + ends[:, s])
    launch = triton_backward.backward_launch(shape, span)
    return tuple(run(launch, *inputs, piece_states, arrays.stack(after[::-1], 1)))


def _placeholder(arrays: Any) -> Any:
    return arrays.zeros((1, 1), dtype=arrays.int32)
