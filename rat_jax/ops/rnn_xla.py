"""The RNN mixing op in plain XLA: it runs everywhere; kernels are compared with it."""

import jax
import jax.numpy as jnp

from rat_jax.ops.recurrence import gated_recurrence
from rat_jax.ops.rnn_types import RnnOutput
from rat_jax.segments import SegmentInfo
from rat_jax.shapes import Array, Float, Float32


def mix(
    projected: Float[Array, "B T c"],  # c = 3 D
    gate_bias: Float32[Array, " D"],
    segments: SegmentInfo,
    state: Float32[Array, "B D"] | None = None,
) -> RnnOutput:
    """See `rat_jax.ops.rnn.rnn_mix`."""
    z, value, gate = jnp.split(projected, 3, axis=-1)
    gate = gate.astype(jnp.float32) + gate_bias.reshape(1, 1, -1)
    states = gated_recurrence(gate, value, segment_ids=segments, initial_state=state)
    out = (jax.nn.sigmoid(z.astype(jnp.float32)) * states).astype(projected.dtype)
    return RnnOutput(out, None if state is None else states[:, -1])
