"""The gated linear recurrence of the RNN and RAT mixers."""

import functools

import jax
import jax.numpy as jnp

from rat_jax.ops import context, cut, dispatch
from rat_jax.segments import SegmentInfo, as_segments, require_continuing
from rat_jax.shapes import Array, Float, Float32, Int


def gated_recurrence(
    gate: Float[Array, "B T *#c"],
    value: Float[Array, "B T *#c"],
    *,
    segment_ids: Int[Array, "B T"] | SegmentInfo | None = None,
    chunk_size: int | None = None,
    initial_state: Float32[Array, "B *c"] | None = None,
    block_size: int = 64,
) -> Float32[Array, "B T *c"]:
    """The running mean h_t = f_t h_{t-1} + (1 - f_t) v_t of arXiv 2507.04416, equation 1, with f = sigmoid(gate).

    The state is zero before the first token of every document, and padding leaves it as it is. All arithmetic is
    float32, from numbers of any floating dtype. `gate` and `value` broadcast against each other over the channel axes
    *c.

    Args:
      gate: of f, with its bias.
      value: v.
      segment_ids: 0 is padding, which may lie before, after and between documents but not inside one; neighbours of
        the same other value are one document. None: each row is one document.
      chunk_size: the state is zero too before every chunk_size-th token of a document; None: before none of them.
      initial_state: h before the first token, None is zero. Rows without `segment_ids` continue from it; of a
        `SegmentInfo` those do whose first token neither begins a document nor a chunk.
      block_size: tokens that are scanned in parallel before states are carried from block to block.

    Raises:
      ValueError: if shapes or sizes do not fit, or an `initial_state` meets ids that leave nothing to continue from it.
    """
    dispatch.check_floating(gate=gate, value=value)
    dispatch.check_whole(1, block_size=block_size)
    if chunk_size is not None:
        dispatch.check_whole(1, chunk_size=chunk_size)
    shape = _common_shape(gate, value)
    if initial_state is not None and initial_state.shape != (shape[0], *shape[2:]):
        raise ValueError(f"initial_state must be {(shape[0], *shape[2:])}, got {initial_state.shape}")
    require_continuing("initial_state", initial_state, segment_ids)
    segments = as_segments(segment_ids, gate.shape[:2])
    if cut.is_cut():
        cut.refuse_state("initial_state", initial_state)
        axes = "BTN" if len(shape) > 2 and gate.shape[2] == value.shape[2] else "BT"
        options = {"chunk_size": chunk_size, "block_size": block_size}
        return cut.run(
            lambda gate, value, segments: gated_recurrence(gate, value, segment_ids=segments, **options),
            (axes, axes, "BT"),
            axes,
            gate,
            value,
            segments,
        )
    starts, is_token = segments.starts(chunk_size), segments.is_token
    if segment_ids is None and initial_state is not None:
        starts &= segments.positions > 0
    forget, take = _gates(gate.astype(jnp.float32))
    starts, is_token = (jnp.expand_dims(mask, range(2, len(shape))) for mask in (starts, is_token))
    decay = jnp.broadcast_to(jnp.where(is_token, jnp.where(starts, 0.0, forget), 1.0), shape)
    update = jnp.where(is_token, take * value.astype(jnp.float32), 0.0)
    if initial_state is None:
        initial_state = jnp.zeros(shape[:1] + shape[2:], jnp.float32)
    return linear_recurrence(decay, update, initial_state, block_size)


def _common_shape(gate: Array, value: Array) -> tuple[int, ...]:
    """[B, T, *c], of equal rows and tokens, and of channels that broadcast."""
    try:
        shape = jnp.broadcast_shapes(gate.shape, value.shape)
    except ValueError:
        shape = ()
    if not gate.size or gate.ndim < 2 or gate.shape[:2] != value.shape[:2] or gate.shape[:2] != shape[:2]:
        raise ValueError(
            f"gate and value must be [B, T, *c] with at least one token and channels that broadcast, got {gate.shape} "
            f"and {value.shape}"
        )
    return shape


@jax.custom_jvp
def _gates(gate: Array) -> tuple[Array, Array]:
    """f and 1 - f, each with all its digits (and so its slope) however near to 0 or 1 the gate is."""
    return jax.nn.sigmoid(gate), jax.nn.sigmoid(-gate)


@_gates.defjvp
def _gates_slope(primals, tangents):
    forget, take = _gates(*primals)
    change = forget * take * tangents[0]
    return (forget, take), (change, -change)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear_recurrence(
    decay: Float32[Array, "B T *c"],
    update: Float32[Array, "B T *c"],
    initial_state: Float32[Array, "B *c"],
    block_size: int,
) -> Float32[Array, "B T *c"]:
    """h_t = decay_t h_{t-1} + update_t with h_{-1} = `initial_state`, by associative scans.

    The backward pass is the same recurrence run from the end: it keeps `decay` and h alone, however deep the scan.
    Of a part of a row (`rat_jax.ops.context`) h_{-1} is the last state of the part before, and `initial_state` zero.
    """
    return _scan(decay, update, initial_state, block_size)[0]


def _forward(decay, update, initial_state, block_size):
    states, before = _scan(decay, update, initial_state, block_size)
    return states, (decay, states, before)


def _backward(block_size, residuals, d_states):
    decay, states, before = residuals
    after = jnp.zeros_like(decay[:, :1]) if context.num_parts() == 1 else context.first_token_after(decay)
    later_decay = jnp.concatenate([decay[:, 1:], after], axis=1)
    from_end = (jnp.flip(x, 1) for x in (later_decay, d_states))
    d_update = jnp.flip(_scan(*from_end, jnp.zeros_like(before), block_size, reverse=True)[0], 1)
    earlier_states = jnp.concatenate([before[:, None], states[:, :-1]], axis=1)
    return d_update * earlier_states, d_update, d_update[:, 0] * decay[:, 0]


linear_recurrence.defvjp(_forward, _backward)


def _scan(
    decay: Array, update: Array, initial_state: Array, block_size: int, reverse: bool = False
) -> tuple[Array, Array]:
    """Scans blocks in parallel, then carries states from block to block; also the state before the first token.

    Args:
      reverse: tokens, and the parts of a row, come from the last to the first.
    """
    batch, tokens, *channels = update.shape
    size = min(block_size, tokens)
    padding = [(0, 0), (0, -tokens % size)] + [(0, 0)] * len(channels)
    blocks = (batch, -1, size, *channels)
    decay = jnp.pad(decay, padding, constant_values=1.0).reshape(blocks)
    update = jnp.pad(update, padding).reshape(blocks)

    def compose(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    decay, inner = jax.lax.associative_scan(compose, (decay, update), axis=2)
    whole_decay, whole_update = jax.lax.associative_scan(compose, (decay[:, :, -1], inner[:, :, -1]), axis=1)
    if context.num_parts() > 1:
        nothing = jnp.ones_like(initial_state), jnp.zeros_like(initial_state)
        own = whole_decay[:, -1], whole_update[:, -1]
        initial_state = context.combined_before(compose, own, nothing, reverse)[1]
    ends = whole_decay * initial_state[:, None] + whole_update
    before = jnp.concatenate([initial_state[:, None], ends[:, :-1]], axis=1)
    states = decay * before[:, :, None] + inner
    return states.reshape(batch, -1, *channels)[:, :tokens], initial_state
