"""Attention of the tokens of a part to all keys of earlier parts of their rows, with the same work on all devices.

A late part has many keys before it, an early one few. So parts i and P - 1 - i share their queries: each takes the
first half of its own and the second half of the other's, and reads P - 1 blocks of keys, where every part by itself
would have to wait for the P - 1 blocks of the last one's whole queries. Half of the queries travel, and what they read.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp

from rat_jax.mesh import CONTEXT_AXIS
from rat_jax.ops import block_attention, context
from rat_jax.ops.attention_types import KeyInfo
from rat_jax.ops.block_attention import Implementation
from rat_jax.ops.document_attention import Attended, Gradients, join
from rat_jax.shapes import Array, Float, Float32, Int

Tree = TypeVar("Tree")


def attend(
    implementation: Implementation,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    query_info: KeyInfo,
    key_info: KeyInfo,
) -> Attended:
    """As `document_attention.attend`, of the keys of all parts, of which those of earlier parts are seen."""
    shared = _share((query, query_info))
    nothing = jax.vmap(Attended.nothing)(shared[0])

    def add_block(sums: Attended, step: Int[Array, ""]) -> tuple[Attended, None]:
        half, block = _pair(step)
        block_query, info = _at(shared, half)
        block_key, block_value, block_info = context.of_part((key, value, key_info), block)
        found = block_attention.attend(implementation, block_query, block_key, block_value, info, block_info)
        return _put(sums, join(_at(sums, half), found), half), None

    out, log_sum_exp = jax.lax.scan(add_block, nothing, _steps())[0]
    out = _give_back(out.astype(query.dtype), query.shape[1])  # rounded before it travels, not after
    log_sum_exp = _give_back(log_sum_exp.transpose(0, 1, 3, 2), query.shape[1])
    return Attended(out.astype(jnp.float32), log_sum_exp.transpose(0, 2, 1))


def gradients(
    implementation: Implementation,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    query_info: KeyInfo,
    key_info: KeyInfo,
    log_sum_exp: Float32[Array, "B N T"],
    delta: Float32[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
) -> Gradients:
    """As `document_attention.gradients`, of the keys of all parts; theirs are sums over the queries taken here."""
    by_token = (x.transpose(0, 2, 1) for x in (log_sum_exp, delta))
    shared = _share((query, query_info, *by_token, d_out))

    def add_block(sums: Gradients, step: Int[Array, ""]) -> tuple[Gradients, None]:
        half, block = _pair(step)
        block_query, info, *rows, block_d_out = _at(shared, half)
        block_key, block_value, block_info = context.of_part((key, value, key_info), block)
        arrays = block_query, block_key, block_value, info, block_info
        by_head = (x.transpose(0, 2, 1) for x in rows)
        found = block_attention.gradients(implementation, *arrays, *by_head, block_d_out)
        d_query = _put(sums.d_query, _at(sums.d_query, half) + found.d_query, half)
        d_key, d_value = (
            context.with_part(total, context.of_part(total, block) + x, block)
            for total, x in ((sums.d_key, found.d_key), (sums.d_value, found.d_value))
        )
        return Gradients(d_query, d_key, d_value), None

    nothing = Gradients(*(jnp.zeros(x.shape, jnp.float32) for x in (shared[0], key, value)))
    found = jax.lax.scan(add_block, nothing, _steps())[0]
    d_query = _give_back(found.d_query.astype(query.dtype), query.shape[1])
    return found._replace(d_query=d_query.astype(jnp.float32))


def _steps() -> Int[Array, " _"]:
    return jnp.arange(context.num_parts() - 1, dtype=jnp.int32)


def _pair(step: Array) -> tuple[Array, Array]:
    """Which half of the queries of `_share` a step takes, and which part's keys: part i's see i parts."""
    own = jax.lax.axis_index(CONTEXT_AXIS)
    is_own = step < own
    return jnp.where(is_own, 0, 1), jnp.where(is_own, step, step - own)


def _share(tree: Tree) -> Tree:
    """[2, B, h, ...]: of a part's tokens the first half, and of its mirror's the second, padded with zeros."""

    def share(x: Array) -> Array:
        half = -(-x.shape[1] // 2)
        later = jnp.pad(x[:, half:], [(0, 0), (0, 2 * half - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
        return jnp.stack([x[:, :half], context.from_mirror(later)])

    return jax.tree.map(share, tree)


def _give_back(x: Array, tokens: int) -> Array:
    """What `_share` cut, whole again."""
    return jnp.concatenate([x[0], context.from_mirror(x[1])], axis=1)[:, :tokens]


def _at(tree: Tree, index: Array) -> Tree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _put(into: Tree, tree: Tree, index: Array) -> Tree:
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, index, axis=0), into, tree)
