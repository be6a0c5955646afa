"""Layers with stacked parameters, run one after the other: in a loop, or without one."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from rat_jax.mesh import BATCH_AXES, CONTEXT_AXIS, TENSOR_AXIS, num_parts

Carry = TypeVar("Carry")  # a tree of arrays
RunLayer = Callable[[Carry, Any, Any], Carry]


def run_layers(run: RunLayer, carry: Carry, stacks: Any, shared: Any, unroll: int) -> Carry:
    """`carry` after carry = run(carry, layer, shared) of each layer in turn.

    Args:
      run: returns arrays of the shapes and dtypes of those it is given. It reads no other arrays that are traced.
      carry: what the first layer is given.
      stacks: a tree of arrays with a leading axis over layers; a layer is the tree without that axis.
      shared: a tree of arrays that every layer reads and that have no gradients.
      unroll: layers of one pass of the loop; all of them, or more, are no loop.
    """
    num_layers = jax.tree.leaves(stacks)[0].shape[0]
    shared = jax.lax.stop_gradient(shared)
    if unroll < num_layers:
        return jax.lax.scan(lambda carry, layer: (run(carry, layer, shared), None), carry, stacks, unroll=unroll)[0]
    return _without_loop(run, carry, stacks, shared, num_layers)


def _without_loop(run: RunLayer, carry: Carry, stacks: Any, shared: Any, num_layers: int) -> Carry:
    """Every layer's gradients are copied into their stacks as soon as they are there.

    Left to the compiler they would be put together at the end, by a kernel that reads from as many arrays as there are
    layers and is several times slower than copies.
    """
    # All layers of a stack are written. Over several devices, XLA does not say how it would cut what nothing wrote.
    several = num_parts(*BATCH_AXES, CONTEXT_AXIS, TENSOR_AXIS) > 1
    new_stack = jnp.zeros if several else jax.lax.empty
    run = jax.jit(run)  # traced and lowered once, kernels in it too, not once for each layer

    @jax.custom_vjp
    def run_all(carry, stacks, shared):
        for index in range(num_layers):
            carry = run(carry, _layer(stacks, index), shared)
        return carry

    def forward(carry, stacks, shared):
        pulls = []
        for index in range(num_layers):
            carry, pull = jax.vjp(run, carry, _layer(stacks, index), shared)
            pulls.append(pull)
        return carry, pulls

    def backward(pulls, d_carry):
        d_stacks = None
        for index in reversed(range(num_layers)):
            d_carry, d_layer, _ = pulls[index](d_carry)
            if d_stacks is None:
                d_stacks = jax.tree.map(lambda x: new_stack((num_layers, *x.shape), x.dtype), d_layer)
            d_stacks = jax.tree.map(
                lambda stack, x, index=index: jax.lax.dynamic_update_index_in_dim(stack, x, index, 0),
                d_stacks,
                d_layer,
            )
            # Else the compiler puts all layers' gradients off to the end, and keeps what they are computed from.
            d_carry, d_stacks = jax.lax.optimization_barrier((d_carry, d_stacks))
        return d_carry, d_stacks, None

    run_all.defvjp(forward, backward)
    return run_all(carry, stacks, shared)


def _layer(stacks: Any, index: int) -> Any:
    return jax.tree.map(lambda x: jax.lax.index_in_dim(x, index, keepdims=False), stacks)
