"""What the parts of a row tell each other where its tokens are cut over devices: inside `jax.shard_map` alone.

Part i of P holds tokens i T/P .. (i + 1) T/P - 1. Outside of such a region, or where rows are whole, there is one part.
Arrays are [B, T, ...] with the part's own tokens.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from rat_jax.mesh import CONTEXT_AXIS, num_parts_here
from rat_jax.shapes import Array, Int, Shaped

Tree = TypeVar("Tree")


def num_parts() -> int:
    """Parts that the rows of this region are cut into."""
    return num_parts_here(CONTEXT_AXIS)


def gather(tree: Tree) -> Tree:
    """Arrays of all parts, one after the other."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, CONTEXT_AXIS, axis=1, tiled=True), tree)


def of_part(tree: Tree, part: Int[Array, ""]) -> Tree:
    """Of arrays of all parts, as `gather` gives them, the tokens of one."""

    def cut(x: Array) -> Array:
        count = x.shape[1] // num_parts()
        return jax.lax.dynamic_slice_in_dim(x, part * count, count, axis=1)

    return jax.tree.map(cut, tree)


def with_part(x: Shaped[Array, "B S *axes"], own: Shaped[Array, "B T *axes"], part: Int[Array, ""]) -> Array:
    """An array of all parts with other tokens of one."""
    return jax.lax.dynamic_update_slice_in_dim(x, own, part * own.shape[1], axis=1)


def tokens_before(x: Shaped[Array, "B T *axes"], count: int) -> Shaped[Array, "B {count} *axes"]:
    """The last `count` tokens before the part's first, from as many neighbours as hold them; zeros before the row."""
    parts, own = num_parts(), x.shape[1]
    found: list[Array] = []
    for distance in range(1, -(-count // own) + 1):
        missing = count - sum(part.shape[1] for part in found)
        wanted = x[:, max(0, own - missing) :]
        if distance >= parts:
            found.insert(0, jnp.zeros((x.shape[0], missing, *x.shape[2:]), x.dtype))
            break
        found.insert(0, _from_earlier(wanted, distance))
    return jnp.concatenate(found, axis=1) if found else x[:, :0]


def from_mirror(tree: Tree) -> Tree:
    """What part P - 1 - i has, on part i: an early part's is a late one's."""
    pairs = [(i, num_parts() - 1 - i) for i in range(num_parts())]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, CONTEXT_AXIS, pairs), tree)


def first_token_after(x: Shaped[Array, "B T *axes"]) -> Shaped[Array, "B 1 *axes"]:
    """The first token of the next part; zeros after the row."""
    return _from_later(x[:, :1], 1)


def combined_before(combine: Callable[[Tree, Tree], Tree], own: Tree, identity: Tree, reverse: bool = False) -> Tree:
    """What all earlier parts (all later ones if `reverse`) have, combined by an associative function, in log2 P rounds.

    Args:
      combine: of what is further away and what is nearer.
      own: of this part.
      identity: for the part that has none before it.
    """
    parts, index = num_parts(), jax.lax.axis_index(CONTEXT_AXIS)
    place, receive = (parts - 1 - index, _from_later) if reverse else (index, _from_earlier)

    def received(tree: Tree, distance: int, otherwise: Tree) -> Tree:
        def choose(x: Array, other: Array) -> Array:
            return jnp.where(place >= distance, receive(x, distance), other)

        return jax.tree.map(choose, tree, otherwise)

    total, distance = own, 1
    while distance < parts:
        further = received(total, distance, identity)
        total = combine(further, total)
        distance *= 2
    return received(total, 1, identity)


def of_last_part(tree: Any) -> Any:
    """On every part, what the last one has."""
    is_last = jax.lax.axis_index(CONTEXT_AXIS) == num_parts() - 1
    return jax.tree.map(lambda x: jax.lax.psum(jnp.where(is_last, x, jnp.zeros_like(x)), CONTEXT_AXIS), tree)


def _from_earlier(x: Array, distance: int) -> Array:
    return jax.lax.ppermute(x, CONTEXT_AXIS, [(i, i + distance) for i in range(num_parts() - distance)])


def _from_later(x: Array, distance: int) -> Array:
    return jax.lax.ppermute(x, CONTEXT_AXIS, [(i + distance, i) for i in range(num_parts() - distance)])
