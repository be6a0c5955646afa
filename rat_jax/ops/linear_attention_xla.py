"""Linear attention in plain XLA: it runs everywhere, with states; kernels are compared with it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rat_jax.mesh import rows_per_device
from rat_jax.ops.linear_attention_types import FeatureMap, LinearAttentionOutput
from rat_jax.shapes import Array, Float, Float32, Int, Shaped

_BLOCK = 128  # tokens between which scores are made; the state is brought up to date once a block
_STEP_TOKENS = 8192  # of all rows of a device, worked on in parallel: what bounds the memory besides inputs and results
_STEP_BLOCKS = 16  # of a row, in parallel; the sum over pairs of them is no part of the cost yet


def features(x: Float[Array, "*axes H"], feature_map: FeatureMap) -> Float32[Array, "*axes E"]:
    """phi(x) = [m(x), m(-x)] where m is the softmax over the channels, or the positive part; in float32."""
    x = x.astype(jnp.float32)
    match feature_map:
        case "softmax":
            parts = jax.nn.softmax(x, axis=-1), jax.nn.softmax(-x, axis=-1)
        case "relu":
            parts = jax.nn.relu(x), jax.nn.relu(-x)
        case _:
            raise ValueError(f"feature_map must be 'softmax' or 'relu', got {feature_map!r}")
    return jnp.concatenate(parts, axis=-1)


def lagged(x: Shaped[Array, "B T *axes"], key_lag: int) -> Shaped[Array, "B T *axes"]:
    """Row t holds what was in row t - key_lag; the first rows are zeros."""
    kept = max(0, x.shape[1] - key_lag)
    return jnp.pad(x[:, :kept], [(0, 0), (x.shape[1] - kept, 0)] + [(0, 0)] * (x.ndim - 2))


def attend(
    feature_map: FeatureMap,
    key_lag: int,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    initial_state: Float[Array, "b n E H"] | None = None,
    documents: Int[Array, "B T"] | None = None,
    state: Float32[Array, "B K E H"] | None = None,
) -> LinearAttentionOutput:
    """See `rat_jax.ops.linear_attention.linear_attention`.

    Tokens are taken in blocks: scores inside, states between. The backward pass makes each block's scores again, so
    that memory grows with T.
    """
    batch, tokens, heads, head_dim = query.shape
    key_heads = key.shape[2]
    key, value = lagged(key, key_lag), lagged(value, key_lag)
    if state is None:
        state = jnp.zeros((batch, key_heads, 2 * head_dim, head_dim), jnp.float32)
    if tokens == 1:
        return _one_token(query, key, value, documents, state, initial_state, feature_map)
    steps, blocks, block = _cut(rows_per_device(batch), tokens)

    def cut(x, mode="constant"):  # [B, T, ...] to [steps, B, blocks, ..., block, H]; keys and values of 0 add nothing
        padding = [(0, 0), (0, steps * blocks * block - tokens)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding, mode=mode).reshape(batch, steps, blocks, block, *x.shape[2:])
        x = jnp.moveaxis(x, 1, 0)
        return x if x.ndim == 4 else jnp.moveaxis(x, 3, -2)

    grouped = query.reshape(batch, tokens, key_heads, heads // key_heads, head_dim)
    rows = _Rows(cut(grouped), cut(key), cut(value), None if documents is None else cut(documents, "edge"))

    def step(carry, rows):
        return _attend_step(rows, *carry, initial_state, feature_map)

    carry = (state, jnp.zeros((batch,), jnp.int32))
    (state, _), out = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), carry, rows)
    out = out.transpose(1, 0, 2, 5, 3, 4, 6).reshape(batch, -1, heads, head_dim)[:, :tokens]
    return LinearAttentionOutput(out, state)


class _Rows(NamedTuple):
    """Blocks of a row, which are its chunks: those that a step works on in parallel, or all, with steps in front."""

    query: Float[Array, "*axes B C K R L H"]
    key: Float[Array, "*axes B C K L H"]
    value: Float[Array, "*axes B C K L H"]
    documents: Int[Array, "*axes B C L"] | None


def _cut(rows: int, tokens: int) -> tuple[int, int, int]:
    """Steps in order, blocks in parallel in each, tokens of a block."""
    block = min(_BLOCK, tokens)
    all_blocks = -(-tokens // block)
    steps = -(-all_blocks // max(1, min(_STEP_BLOCKS, _STEP_TOKENS // (rows * block))))
    return steps, -(-all_blocks // steps), block


def _attend_step(
    rows: _Rows,
    state: Float32[Array, "B K E H"],
    document: Int[Array, " B"],
    initial_state: Array | None,
    feature_map: FeatureMap,
) -> tuple[tuple[Array, Array], Float[Array, "B C K R L H"]]:
    """The blocks of a step; `state` and `document` are those before the first and, returned, after the last."""
    value, documents = rows.value, rows.documents
    dtype, shape = value.dtype, rows.query.shape
    batch, blocks, key_heads, shared, block, _ = shape
    query, key = (features(x, feature_map).astype(dtype) for x in (rows.query, rows.key))
    query = query.reshape(batch, blocks, key_heads, shared * block, -1)
    visible = jnp.tril(jnp.ones((block, block), bool))[None, None, None, None]
    if documents is None:
        last = before = jnp.zeros((batch, blocks), jnp.int32)
        added_value = value
    else:
        visible &= (documents[..., :, None] == documents[..., None, :])[:, :, None, None]
        last = documents[..., -1]
        # What a block adds belongs to its last document, and goes to the blocks that begin within it.
        before = jnp.concatenate([document[:, None], last[:, :-1]], axis=1)
        added_value = jnp.where((documents == last[..., None])[:, :, None, :, None], value, 0)
    with jax.named_scope("within_blocks"):
        scores = _product("bckxe,bckme->bckxm", query, key).reshape(*shape[:-1], block)
        scores = jnp.where(visible, scores, 0.0).astype(dtype).reshape(*query.shape[:-1], block)
        out = _product("bckxm,bckmh->bckxh", scores, value).reshape(shape)
    with jax.named_scope("between_blocks"):
        added = _product("bckme,bckmh->bckeh", key, added_value)
        added = jnp.concatenate([state[:, None], added], axis=1)
        ends = jnp.concatenate([document[:, None], last], axis=1)
        reaches = jnp.tril(jnp.ones((blocks + 1, blocks + 1), bool))[None] & (ends[:, None, :] == ends[:, :, None])
        states = jnp.einsum("bcj,bjkeh->bckeh", reaches.astype(jnp.float32), added, precision="highest")
        carried = _product("bckxe,bckeh->bckxh", query, states[:, :-1].astype(dtype)).reshape(shape)
        if documents is not None:
            carried = jnp.where((documents == before[..., None])[:, :, None, None, :, None], carried, 0.0)
        out += carried
    if initial_state is not None:
        count = initial_state.shape[1]
        initial = jnp.broadcast_to(initial_state[:, None].astype(dtype), (batch, blocks, *initial_state.shape[1:]))
        query = query.reshape(batch, blocks, count, -1, query.shape[-1])
        out += _product("bckxe,bckeh->bckxh", query, initial).reshape(shape)
    return (states[:, -1], last[:, -1]), out.astype(dtype)


def _product(equation: str, left: Array, right: Array) -> Float32[Array, "..."]:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _one_token(
    query: Float[Array, "B 1 N H"],
    key: Float[Array, "B 1 K H"],
    value: Float[Array, "B 1 K H"],
    documents: Int[Array, "B 1"] | None,
    state: Float32[Array, "B K E H"],
    initial_state: Array | None,
    feature_map: FeatureMap,
) -> LinearAttentionOutput:
    """A step of a row: one pass over the states, in float32."""
    batch, _, heads, head_dim = query.shape
    key_heads = key.shape[2]
    if documents is not None:
        state = jnp.where((documents == 0)[:, :, None, None], state, 0.0)
    added = features(key[:, 0], feature_map)[..., None] * value[:, 0, :, None].astype(jnp.float32)
    state += added
    read = features(query.reshape(batch, key_heads, heads // key_heads, head_dim), feature_map)
    out = jnp.einsum("bkre,bkeh->bkrh", read, state)
    if initial_state is not None:
        row = "b" if initial_state.shape[0] > 1 else ""
        each = "r" if initial_state.shape[1] > key_heads else ""
        sizes = ((batch,) if row else ()) + ((key_heads, heads // key_heads) if each else (key_heads,))
        initial = initial_state.astype(jnp.float32).reshape(*sizes, 2 * head_dim, head_dim)
        out += jnp.einsum(f"bkre,{row}k{each}eh->bkrh", read, initial)
    return LinearAttentionOutput(out.reshape(query.shape).astype(value.dtype), state)
