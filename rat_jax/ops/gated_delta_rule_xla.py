"""The gated delta rule in plain XLA: it runs everywhere; kernels are compared with it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rat_jax.mesh import rows_per_device
from rat_jax.ops.gated_delta_rule_types import GatedDeltaRuleOutput
from rat_jax.ops.remat import save_named
from rat_jax.shapes import Array, Bool, Float, Float32

_GROUP_TOKENS = 8192  # of all rows of a device, whose chunks are prepared side by side: bounds the memory


def rule(
    query: Float[Array, "B T N Hk"],
    key: Float[Array, "B T N Hk"],
    value: Float[Array, "B T N Hv"],
    log_decay: Float32[Array, "B T N"],
    write_strength: Float32[Array, "B T N"],
    initial_state: Float32[Array, "B N Hk Hv"] | None,
    starts: Bool[Array, "B T"] | None,
    chunk_size: int,
) -> GatedDeltaRuleOutput:
    """See `rat_jax.ops.gated_delta_rule.gated_delta_rule`.

    Args:
      log_decay: finite, and 0 of padding, as `write_strength` is.
      starts: the first tokens of documents; None: rows go on from the state.
    """
    batch, tokens, heads, key_dim = key.shape
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key_dim, value.shape[-1]), jnp.float32)
    rows = _Chunks(query, key, value, log_decay, write_strength, starts)
    return _one_token(rows, initial_state) if tokens == 1 else _all_chunks(rows, initial_state, chunk_size)


class _Chunks(NamedTuple):
    """Inputs as they come, [B, T, N, ...], or cut, [..., B, N, L, ...] with axes of groups and of chunks in front."""

    query: Array
    key: Array
    value: Array
    log_decay: Array
    write_strength: Array
    starts: Bool[Array, "*axes"] | None


def _all_chunks(rows: _Chunks, state: Float32[Array, "B N Hk Hv"], chunk_size: int) -> GatedDeltaRuleOutput:
    """Groups of chunks one after the other; all of a group are prepared side by side, then states run through them."""
    batch, tokens, heads, value_dim = rows.value.shape
    size = min(chunk_size, tokens)
    all_chunks = -(-tokens // size)
    groups = -(-all_chunks // max(1, _GROUP_TOKENS // (rows_per_device(batch) * size)))
    chunks = -(-all_chunks // groups)

    def cut(x):  # [B, T, ...] to [groups, chunks, B, ..., L]; keys and write strengths of 0 change no state
        x = jnp.pad(x, [(0, 0), (0, groups * chunks * size - tokens)] + [(0, 0)] * (x.ndim - 2))
        x = jnp.moveaxis(x.reshape(batch, groups, chunks, size, *x.shape[2:]), 0, 2)
        return x if x.ndim == 4 else jnp.moveaxis(x, 3, 4)

    group = jax.checkpoint(_group, prevent_cse=False)
    state, out = jax.lax.scan(lambda state, rows: group(save_named(state), rows), state, jax.tree.map(cut, rows))
    out = save_named(out)
    out = jnp.moveaxis(out, (2, 4), (0, 3)).reshape(batch, -1, heads, value_dim)[:, :tokens]
    return GatedDeltaRuleOutput(out, state)


def _group(state: Float32[Array, "B N Hk Hv"], rows: _Chunks) -> tuple[Array, Float[Array, "C B N L Hv"]]:
    """The chunks of a group; `state` is that before the first and, returned, that after the last.

    With G the running sum of log decays from the start of a chunk and S the state before it, the corrections
    u_t = b_t (v_t - a_t S_{t-1}^T k_t) solve u_t + b_t sum_{j < t} exp(G_t - G_j) (k_t k_j) u_j = b_t (v_t - exp(G_t)
    S^T k_t), queries read exp(G_t) S^T q_t + sum_{j <= t} exp(G_t - G_j) (q_t k_j) u_j, and the chunk leaves
    exp(G_L) S + sum_j exp(G_L - G_j) k_j u_j^T.
    """
    dtype = rows.value.dtype
    with jax.named_scope("within_chunks"):
        decay, from_start, to_end = _decays(rows.log_decay, rows.starts)
        strength = rows.write_strength[..., None]
        overlaps = strength * decay * _product("cbnlh,cbnmh->cbnlm", rows.key, rows.key)
        solve = _unit_lower_inverse(jnp.tril(overlaps, -1)).astype(dtype)
        scores = (decay * _product("cbnlh,cbnmh->cbnlm", rows.query, rows.key)).astype(dtype)
        added_key = (to_end[..., None] * rows.key).astype(dtype)
        readers = jnp.concatenate([rows.key, rows.query], axis=-2)

    def chunk(state, inputs):
        solve, scores, readers, added_key, value, strength, from_start, kept = inputs
        held, read = jnp.split(_product("bnlk,bnkv->bnlv", readers, state.astype(dtype)), 2, axis=-2)
        wanted = strength * (value - from_start[..., None] * held)
        correction = _product("bnlm,bnmv->bnlv", solve, wanted.astype(dtype)).astype(dtype)
        out = from_start[..., None] * read + _product("bnlm,bnmv->bnlv", scores, correction)
        state = kept[..., None, None] * state + _product("bnlk,bnlv->bnkv", added_key, correction)
        return state, out.astype(dtype)

    with jax.named_scope("between_chunks"):
        kept = from_start[..., -1]
        inputs = (solve, scores, readers, added_key, rows.value, strength, from_start, kept)
        return jax.lax.scan(chunk, state, inputs)


def _decays(
    log_decay: Float32[Array, "*axes B N L"], starts: Bool[Array, "*axes B L"] | None
) -> tuple[Float32[Array, "*axes B N L L"], Float32[Array, "*axes B N L"], Float32[Array, "*axes B N L"]]:
    """What token l keeps of what token m <= l wrote, what it keeps of the state before the chunk, and what the last
    token keeps of each; nothing across the start of a document.

    Each is exp of its own sum of log decays: differences of running sums would lose the digits of small decays that
    follow large ones.
    """
    size = log_decay.shape[-1]
    visible = up_to = jnp.tril(jnp.ones((size, size), bool))
    after = jnp.tril(jnp.ones((size, size)), -1)
    indices = (1,) * (log_decay.ndim - 1)
    # sums[l, m] is over m < i <= l: one product with 0s and 1s.
    summands = log_decay[..., :, None] * after.reshape(*indices, size, size)
    lower = up_to.astype(jnp.float32)
    sums = jnp.einsum("li,...im->...lm", lower, summands, precision="highest")
    from_start = jnp.einsum("li,...i->...l", lower, log_decay, precision="highest")
    visible = visible.reshape(*indices, size, size)
    if starts is not None:
        documents = jnp.cumsum(starts, axis=-1)[..., None, :]  # 0: the one that the state before the chunk is of
        visible = visible & (documents[..., :, None] == documents[..., None, :])
        from_start = jnp.where(documents == 0, from_start, -jnp.inf)
    decay = jnp.exp(jnp.where(visible, sums, -jnp.inf))
    return decay, jnp.exp(from_start), decay[..., -1, :]


@jax.custom_jvp
def _unit_lower_inverse(strictly_lower: Float32[Array, "*axes L L"]) -> Float32[Array, "*axes L L"]:
    """(I + A)^-1 of a strictly lower triangular A.

    Blocks along the diagonal double in size: with both halves X and Z of a block inverted, its lower left quarter is
    -Z A X. Unlike a series in powers of A, no term exceeds the entries of the inverses by much.
    """
    size = strictly_lower.shape[-1]
    index = jnp.arange(size)
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=strictly_lower.dtype), strictly_lower.shape)
    half = 1
    while half < size:
        row, column = index[:, None] // half, index[None, :] // half
        quarter = ((row % 2 == 1) & (row == column + 1)).reshape((1,) * (strictly_lower.ndim - 2) + (size, size))
        quarters = jnp.where(quarter, strictly_lower, 0.0)
        inverse -= quarters if half == 1 else exact(exact(inverse, quarters), inverse)
        half *= 2
    return inverse


@_unit_lower_inverse.defjvp
def _unit_lower_inverse_slope(primals, tangents):
    inverse = _unit_lower_inverse(*primals)
    return inverse, -exact(exact(inverse, tangents[0]), inverse)


def exact(left: Float32[Array, "*axes L K"], right: Float32[Array, "*axes K V"]) -> Float32[Array, "*axes L V"]:
    """The product of float32 matrices, of all their digits."""
    return jnp.matmul(left, right, precision="highest")


def _product(equation: str, left: Array, right: Array) -> Float32[Array, "..."]:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _one_token(rows: _Chunks, state: Float32[Array, "B N Hk Hv"]) -> GatedDeltaRuleOutput:
    """One update of the state: sums of float32 products, without matrix units."""
    query, key, value = (x[:, 0].astype(jnp.float32) for x in (rows.query, rows.key, rows.value))
    kept = jnp.exp(rows.log_decay[:, 0])
    if rows.starts is not None:
        kept = jnp.where(rows.starts, 0.0, kept)
    state = kept[..., None, None] * state
    held = jnp.sum(state * key[..., None], axis=-2)
    correction = rows.write_strength[:, 0, :, None] * (value - held)
    state += key[..., None] * correction[..., None, :]
    out = jnp.sum(state * query[..., None], axis=-2)
    return GatedDeltaRuleOutput(out[:, None].astype(rows.value.dtype), state)
