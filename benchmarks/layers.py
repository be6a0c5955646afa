"""One layer of every mixer by itself: norm, input projection, mixing, output projection, residual; and its decode step.

Attention and local attention are cuDNN's, so that they are as fast a baseline as the device has. RAT is the public op,
in the body that is asked for; RAttention is the mixer of the library, between the same two projections as attention.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.caches import at_position, bytes_read
from configs import default
from rat_jax.config import config_from_dict
from rat_jax.layers import NORM_EPSILON
from rat_jax.mixers.attention import AttentionCache
from rat_jax.mixers.rattention import Rattention, RattentionCache
from rat_jax.mixers.rnn import RnnCache
from rat_jax.ops.rat import RatImplementation, rat_mix
from rat_jax.ops.rat_types import RatState
from rat_jax.ops.recurrence import gated_recurrence
from rat_jax.ops.rope import rotate
from rat_jax.segments import SegmentInfo, whole_rows
from rat_jax.shapes import Array, Float, Int

ROPE_BASE = 10_000.0
DTYPE = jnp.bfloat16
_CUDNN_SLOTS = 64  # cuDNN takes keys in multiples of this at its fastest


class Sizes(NamedTuple):
    """Of all layers of a table."""

    width: int  # D
    heads: int  # N
    key_heads: int  # K, of attention, local attention and RAttention
    groups: int  # G, of RAT
    chunk_size: int  # L
    window: int  # W, where the layer's name has none


class Layer(NamedTuple):
    """What the kinds of layer differ in."""

    channels: int  # of the input projection
    mix: Callable[[Array, Array], Array]  # projected [B, T, X], gate bias [D] -> [B, T, D]
    step: Callable[[Array, Array, Int[Array, ""], Any], tuple[Array, Any]]  # projected, bias, position, cache
    new_cache: Callable[[int, int], Any]  # rows, capacity -> an empty cache
    keys: Callable[[int], float]  # T -> keys that a token attends to, in the mean, or as many as cost the same products


def make_layer(kind: str, sizes: Sizes) -> Layer:
    """The layer of a kind: attention, local_attention[:WINDOW], rattention[:WINDOW], rnn or rat[:IMPLEMENTATION].

    Raises:
      ValueError: if there is no such kind or implementation.
    """
    width, head_dim = sizes.width, sizes.width // sizes.heads
    attention_channels = width + 2 * sizes.key_heads * head_dim
    match kind.split(":"):
        case ["attention"]:
            return Layer(
                attention_channels,
                functools.partial(_attention, sizes=sizes, window=None),
                functools.partial(_attention_step, sizes=sizes, slots=None),
                functools.partial(_attention_cache, sizes=sizes),
                lambda tokens: (tokens + 1) / 2,
            )
        case ["local_attention", *windows] if len(windows) <= 1:
            window = _window(windows, sizes)
            return Layer(
                attention_channels,
                functools.partial(_attention, sizes=sizes, window=window),
                functools.partial(_attention_step, sizes=sizes, slots=window + 1),
                lambda rows, capacity: _attention_cache(rows, min(window + 1, capacity), sizes),
                lambda tokens: _keys_in_window(window, tokens),
            )
        case ["rattention", *windows] if len(windows) <= 1:
            window = _window(windows, sizes)
            states = head_dim * (1 + sizes.key_heads / sizes.heads)  # read by every head, summed up by key heads
            mixer = functools.partial(_rattention, sizes, window)
            return Layer(
                attention_channels,
                lambda projected, gate_bias: mixer().mix(projected, whole_rows(*projected.shape[:2]))[0],
                functools.partial(_rattention_step, mixer),
                lambda rows, capacity: mixer().init_cache(rows, capacity),
                lambda tokens: _keys_in_window(window, tokens) + states,
            )
        case ["rnn"]:
            return Layer(3 * width, _rnn, _rnn_step, functools.partial(_rnn_cache, sizes=sizes), lambda tokens: 0)
        case ["rat", *implementations] if len(implementations) <= 1:
            if implementations and implementations[0] not in typing.get_args(RatImplementation):
                known = ", ".join(typing.get_args(RatImplementation))
                raise ValueError(f"the op knows no implementation {implementations[0]!r}, only {known}")
            options = {
                "num_heads": sizes.heads,
                "num_groups": sizes.groups,
                "chunk_size": sizes.chunk_size,
                "rope_base": ROPE_BASE,
                "implementation": implementations[0] if implementations else None,
            }
            return Layer(
                3 * width + 2 * sizes.groups * head_dim,
                functools.partial(_rat, **options),
                functools.partial(_rat_step, **options),
                lambda rows, capacity: RatState.empty(rows, capacity, sizes.heads, head_dim, sizes.chunk_size, DTYPE),
                lambda tokens: tokens / (2 * sizes.chunk_size),
            )
    raise ValueError(f"no layer is called {kind!r}")


def _window(named: list[str], sizes: Sizes) -> int:
    if not named:
        return sizes.window
    if not named[0].isdecimal():
        raise ValueError(f"a window is a number of tokens, got {named[0]!r}")
    return int(named[0])


def _keys_in_window(window: int, tokens: int) -> float:
    """Keys that a token sees in the mean, itself and at most `window` before it."""
    early = min(window, tokens)  # the token at place t < W sees t + 1
    return (early * (early + 1) / 2 + (tokens - early) * (window + 1)) / tokens


def make_params(channels: int, width: int) -> dict[str, Array]:
    """Random parameters; matrices in the compute dtype."""
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "scale": jnp.ones((width,), jnp.float32),
        "in": 0.02 * jax.random.normal(keys[0], (width, channels), DTYPE),
        "out": 0.02 * jax.random.normal(keys[1], (width, width), DTYPE),
        "gate_bias": jax.random.normal(keys[2], (width,)) + 2,
    }


def apply_layer(layer: Layer, params: dict[str, Array], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """x + W_o mix(W_i norm(x))."""
    return x + layer.mix(_norm(x, params["scale"]) @ params["in"], params["gate_bias"]) @ params["out"]


def train_layer(layer: Layer, params: dict[str, Array], x: Array, d_out: Array) -> tuple[Array, Any]:
    """The output and the gradients of parameters and input."""
    out, pull = jax.vjp(functools.partial(apply_layer, layer), params, x)
    return out, pull(d_out)


def decode(
    layer: Layer, sizes: Sizes, steps: int, params: dict[str, Array], x: Array, cache: Any, position: Int[Array, ""]
) -> tuple[Array, Any]:
    """The `steps` steps of a layer that end before `position`, each fed with the output of the one before.

    The cache, to be donated, is the carry of the loop, so that it is updated in place.
    """
    first = position - steps

    def step(i, carry):
        x, cache = carry
        projected = _norm(x, params["scale"]) @ params["in"]
        mixed, cache = layer.step(projected, params["gate_bias"], first + i, cache)
        return x + mixed @ params["out"], cache

    return jax.lax.fori_loop(0, steps, step, (x, at_position(cache, first, sizes.chunk_size)))


def product_operations(layer: Layer, width: int, batch: int, tokens: int) -> tuple[float, float]:
    """Operations of the two projections, and of the scores and weighted sums, in one forward pass."""
    count = batch * tokens
    return 2 * count * width * (layer.channels + width), 4 * count * layer.keys(tokens) * width


def least_bytes(layer: Layer, width: int, count: int) -> tuple[int, int]:
    """Bytes that norm and mixing move at least for `count` tokens: by the forward pass, by both passes.

    Forward: x in, normed out; projected in, mixed out. Backward: projected and the mixed tokens' gradient in, that of
    projected out; x and two gradients in, that of x out, and one more for the recomputed norm.
    """
    forward = layer.channels + 3 * width
    backward = 2 * layer.channels + 5 * width
    size = jnp.dtype(DTYPE).itemsize
    return size * count * forward, size * count * (forward + backward)


def step_bytes(layer: Layer, sizes: Sizes, rows: int, position: int) -> int:
    """Bytes that a decode step at `position` reads at least: the cache and the matrices."""
    cache = jax.eval_shape(lambda: layer.new_cache(rows, position))
    matrices = jnp.dtype(DTYPE).itemsize * sizes.width * (layer.channels + sizes.width)
    return bytes_read(cache, position, sizes.chunk_size) + matrices


def _norm(x: Array, scale: Array) -> Array:
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + NORM_EPSILON)
    return (x32 * inverse * scale.reshape(1, 1, -1)).astype(x.dtype)


def _heads(projected: Array, sizes: Sizes, positions: Array) -> tuple[Array, Array, Array]:
    """Queries [B, T, N, H], keys and values [B, T, K, H] of a projection that holds them in this order."""
    head_dim = sizes.width // sizes.heads
    edges = [sizes.width, sizes.width + sizes.key_heads * head_dim]
    query, key, value = (x.reshape(*x.shape[:2], -1, head_dim) for x in jnp.split(projected, edges, axis=-1))
    return rotate(query, positions, ROPE_BASE), rotate(key, positions, ROPE_BASE), value


def _attention(projected: Array, gate_bias: Array, *, sizes: Sizes, window: int | None) -> Array:
    del gate_bias
    batch, tokens = projected.shape[:2]
    query, key, value = _heads(projected, sizes, whole_rows(batch, tokens).positions)
    local = {} if window is None else {"local_window_size": (window, 0)}
    out = jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn", **local)
    return out.reshape(batch, tokens, sizes.width)


def _attention_cache(rows: int, capacity: int, sizes: Sizes) -> AttentionCache:
    slots = -(-capacity // _CUDNN_SLOTS) * _CUDNN_SLOTS
    zeros = jnp.zeros((rows, slots, sizes.key_heads, sizes.width // sizes.heads), DTYPE)
    return AttentionCache(zeros, zeros, jnp.zeros((rows, slots), jnp.int32))


def _attention_step(
    projected: Array, gate_bias: Array, position: Array, cache: AttentionCache, *, sizes: Sizes, slots: int | None
) -> tuple[Array, AttentionCache]:
    """All rows stand at the same position; in a ring of `slots` the keys' order does not matter."""
    del gate_bias
    rows = projected.shape[0]
    query, key, value = _heads(projected, sizes, jnp.full((rows, 1), position, jnp.int32))
    slot = position if slots is None else position % slots
    count = position + 1 if slots is None else jnp.minimum(position + 1, slots)
    cache = dataclasses.replace(
        cache,
        key=jax.lax.dynamic_update_slice_in_dim(cache.key, key, slot, axis=1),
        value=jax.lax.dynamic_update_slice_in_dim(cache.value, value, slot, axis=1),
    )
    lengths = jnp.full((rows,), count, jnp.int32)
    out = jax.nn.dot_product_attention(
        query, cache.key, cache.value, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out.reshape(rows, 1, -1), cache


def _rattention(sizes: Sizes, window: int) -> Rattention:
    """The mixer; made inside a traced function, where its unused projections cost nothing."""
    model = config_from_dict(default.get_config()).model
    options = dataclasses.replace(model.rattention, window=window, rope=True, rope_base=ROPE_BASE)
    config = dataclasses.replace(
        model,
        width=sizes.width,
        num_heads=sizes.heads,
        num_kv_heads=sizes.key_heads,
        dtype=jnp.dtype(DTYPE).name,
        rattention=options,
    )
    return Rattention(config, rngs=nnx.Rngs(0))


def _rattention_step(
    mixer: Callable[[], Rattention], projected: Array, gate_bias: Array, position: Array, cache: RattentionCache
) -> tuple[Array, RattentionCache]:
    del gate_bias
    return mixer().mix(projected, _one_token(projected.shape[0], position), cache)


def _rnn(projected: Array, gate_bias: Array) -> Array:
    return _gated(projected, gate_bias, whole_rows(*projected.shape[:2]), None)[0]


def _rnn_cache(rows: int, capacity: int, sizes: Sizes) -> RnnCache:
    del capacity
    return RnnCache(jnp.zeros((rows, sizes.width), jnp.float32))


def _rnn_step(projected: Array, gate_bias: Array, position: Array, cache: RnnCache) -> tuple[Array, RnnCache]:
    mixed, states = _gated(projected, gate_bias, _one_token(projected.shape[0], position), cache.state)
    return mixed, RnnCache(states[:, -1])


def _gated(projected: Array, gate_bias: Array, segments: SegmentInfo, state: Array | None) -> tuple[Array, Array]:
    z, value, gate = jnp.split(projected, 3, axis=-1)
    states = gated_recurrence(
        gate.astype(jnp.float32) + gate_bias.reshape(1, 1, -1),
        value,
        segment_ids=segments,
        initial_state=state,
    )
    return (jax.nn.sigmoid(z.astype(jnp.float32)) * states).astype(projected.dtype), states


def _rat(projected: Array, gate_bias: Array, **options: Any) -> Array:
    return rat_mix(projected, gate_bias, whole_rows(*projected.shape[:2]), **options).out


def _rat_step(
    projected: Array, gate_bias: Array, position: Array, cache: RatState, **options: Any
) -> tuple[Array, RatState]:
    return rat_mix(projected, gate_bias, _one_token(projected.shape[0], position), state=cache, **options)


def _one_token(rows: int, position: Array) -> SegmentInfo:
    positions = jnp.full((rows, 1), position, jnp.int32)
    return SegmentInfo(jnp.ones_like(positions), positions, positions, contiguous=False)
