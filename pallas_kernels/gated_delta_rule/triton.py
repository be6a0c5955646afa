"""The gated delta rule by Triton kernels (arXiv 2412.06464, section 3.3): forward and backward on one device, for GPUs.

    S_t = a_t S_{t-1} + b_t k_t (v_t - a_t S_{t-1}^T k_t)^T,    out_t = S_t^T q_t,    a = exp(log_decay).

Rows are cut into chunks of L tokens. With G the running sum of log decays in a chunk, S the state before it and
A_ij = b_i exp(G_i - G_j) k_i k_j below the diagonal, corrections are u = (I + A)^-1 b (v - exp(G) S^T k), queries read
exp(G) S^T q + sum_{j <= i} exp(G_i - G_j) (q_i k_j) u_j, and exp(G_L) S + sum_j exp(G_L - G_j) k_j u_j^T leaves it.

    `gated_delta_chunks`     (I + A)^-1, scores and decays, all chunks side by side
    `gated_delta_states`     corrections, and the state before each chunk, in order
    `gated_delta_outputs`    what queries read, side by side
    `gated_delta_d_states`   gradients of corrections and of states, in order from the last chunk on
    `gated_delta_gradients`  those of the inputs, side by side

Gates, A and its inverse, decays and the state are float32, with products of 16 bits that are summed in float32; those
that join inverses of blocks take 16 bits of each float32, and their result is rounded to 8 or 11.

The backward pass runs the first two again: nothing is kept for it but the inputs. States are written in the dtype of
values, Hk Hv elements a chunk and head in each pass, for as long as the pass takes.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import triton_backward
from pallas_kernels.gated_delta_rule.shape import GatedDeltaRuleShape
from pallas_kernels.gated_delta_rule.triton_chunks import chunks_launch
from pallas_kernels.gated_delta_rule.triton_outputs import outputs_launch
from pallas_kernels.gated_delta_rule.triton_states import states_launch
from pallas_kernels.gated_delta_rule.triton_tiling import Tiling
from pallas_kernels.launch import triton as launcher


def gated_delta_rule_forward(
    shape: GatedDeltaRuleShape,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    write_strength: jax.Array,
    starts: jax.Array | None,
    initial_state: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """What queries read [B, T, N, Hv] in the dtype of `value`, and the state after the last token [B, N, Hk, Hv].

    Args:
      shape: sizes for which `triton_tiling.unsupported_reason` has no reason.
      query: [B, T, N, Hk] bfloat16 or float16; `key` is alike, `value` [B, T, N, Hv] of the same dtype.
      log_decay: [B, T, N] float32, at most 0 and finite; `write_strength` is alike.
      starts: int32 [B, T], 1 at the first token of each document, where `segmented`, else None.
      initial_state: [B, N, Hk, Hv] float32, before the first token, where `continued`, else None.
    """
    arrays = query, key, value, log_decay, write_strength, *_or_placeholders(starts, initial_state)
    return forward(launcher.run, Tiling(shape), *arrays)


def gated_delta_rule_backward(
    shape: GatedDeltaRuleShape,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    write_strength: jax.Array,
    starts: jax.Array | None,
    initial_state: jax.Array | None,
    d_out: jax.Array,
    d_final_state: jax.Array,
) -> tuple[jax.Array, ...]:
    """Gradients of query, key, value, log decay, write strength and the state before the first token.

    `d_out` and `d_final_state` are those of the results of `gated_delta_rule_forward`, which takes the other arguments.
    """
    arrays = query, key, value, log_decay, write_strength, *_or_placeholders(starts, initial_state)
    return backward(launcher.run, Tiling(shape), *arrays, d_out.astype(value.dtype), d_final_state.astype(jnp.float32))


def forward(
    run: launcher.Run, tiling: Tiling, query, key, value, log_decay, write_strength, starts, initial
) -> tuple[Any, Any]:
    """The forward kernels through `run`, on the arrays of whatever library it runs them with."""
    _, scores, decays, (corrections, states, final_state) = _carried(
        run, tiling, query, key, value, log_decay, write_strength, starts, initial
    )
    (out,) = run(outputs_launch(tiling), query, corrections, states, scores, decays[0])
    return out, final_state


def backward(
    run: launcher.Run,
    tiling: Tiling,
    query,
    key,
    value,
    log_decay,
    write_strength,
    starts,
    initial,
    d_out,
    d_final,
) -> tuple[Any, ...]:
    """The backward kernels through `run`; see `gated_delta_rule_backward`."""
    solve, scores, decays, (corrections, states, _) = _carried(
        run, tiling, query, key, value, log_decay, write_strength, starts, initial
    )
    of_d_states = query, key, write_strength, d_out, solve, scores, *decays, d_final
    d_wanted, d_states, d_initial = run(triton_backward.d_states_launch(tiling), *of_d_states)
    of_tokens = query, key, value, log_decay, write_strength, starts, d_out
    of_chunks = scores, *decays, corrections, states, d_wanted, d_states
    d_query, d_key, d_value, *of_gates = run(triton_backward.gradients_launch(tiling), *of_tokens, *of_chunks)
    return d_query, d_key, d_value, *(partial.sum(0) for partial in of_gates), d_initial


def _carried(run: launcher.Run, tiling: Tiling, query, key, value, log_decay, write_strength, starts, initial):
    """What both passes begin with: of chunks the inverses, the scores and both decays, and what goes through rows."""
    solve, scores, *decays = run(chunks_launch(tiling), query, key, log_decay, write_strength, starts)
    return solve, scores, decays, run(states_launch(tiling), key, value, write_strength, solve, *decays, initial)


def _or_placeholders(starts: jax.Array | None, initial_state: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Both as the kernels take them, of one element where there is none."""
    starts = jnp.zeros((1, 1), jnp.int32) if starts is None else starts
    return starts, jnp.zeros((1, 1, 1, 1), jnp.float32) if initial_state is None else initial_state
