"""Linear attention by kernels: one differentiable function over the kernels of every platform."""

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from rat_jax.ops import linear_attention_xla
from rat_jax.ops.linear_attention_types import FeatureMap, LinearAttentionOutput
from rat_jax.ops.platform import devices, expected_capability, expected_platform, on_each_device
from rat_jax.ops.remat import save_named
from rat_jax.shapes import Array, Float, Int

_PLATFORMS = {"mosaic_gpu": "cuda", "triton": "cuda", "pallas_tpu": "tpu"}
_HOPPER = 9  # compute capability 9.x
TAKE_KEY_LAG = ("mosaic_gpu",)


def candidates() -> tuple[str, ...]:
    """Kernels worth tracing here, the fastest first; which body runs is settled when the program is lowered."""
    match expected_platform():
        case "gpu" | "cuda":
            capability = expected_capability()
            on_hopper = capability is not None and capability[0] == _HOPPER
            return ("mosaic_gpu", "triton") if on_hopper else ("triton",)
        case "tpu":
            return ("pallas_tpu",)
        case _:
            return ()


def refusal(
    kernel: str,
    query: Array,
    key: Array,
    value: Array,
    initial_state: Array | None,
    documents: Array | None,
    state: Array | None,
) -> str | None:
    """Why a kernel cannot run a call and what comes nearest; None where it can."""
    if state is not None:
        return "it takes no state; implementation 'xla' does"
    if not query.dtype == key.dtype == value.dtype:
        return f"queries, keys and values differ in dtype: {query.dtype}, {key.dtype}, {value.dtype}"
    if query.shape[0] % devices():
        return f"{query.shape[0]} batch rows do not divide among the {devices()} devices of the mesh"
    initial_shape = None if initial_state is None else initial_state.shape
    if kernel == "mosaic_gpu":
        capability = expected_capability()
        if capability is not None and capability[0] != _HOPPER:
            return f"it needs a card of compute capability 9.x, this one has {capability[0]}.{capability[1]}"
        if initial_state is not None or documents is not None:
            return "it takes neither packed documents nor an initial state; implementation 'triton' does"
    return _module(kernel).refusal(query.shape, key.shape, query.dtype, initial_shape=initial_shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def attend(
    kernel: str,
    fall_back: bool,
    feature_map: FeatureMap,
    key_lag: int,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    initial_state: Float[Array, "b n 2*H H"] | None,
    documents: Int[Array, "B T"] | None,
) -> LinearAttentionOutput:
    """See `rat_jax.ops.linear_attention.linear_attention`. On a mesh, each device runs its own batch rows.

    Args:
      kernel: one of `_PLATFORMS`.
      fall_back: lowered for another platform than the kernel's, run the plain XLA body instead.
      feature_map: as there.
      key_lag: as there; 0 for a kernel that is not in `TAKE_KEY_LAG`.
      query, key, value, initial_state, documents: as there.
    """
    return _forward(kernel, fall_back, feature_map, key_lag, query, key, value, initial_state, documents)[0]


def _forward(kernel, fall_back, feature_map, key_lag, query, key, value, initial_state, documents):
    arrays = (query, key, value, initial_state, documents)

    def run(query, key, value, *more):
        options = _options(kernel, feature_map, key_lag, *more)
        return _module(kernel).linear_attention_forward(query, key, value, **options)

    def plain(*arrays):
        residuals = jax.eval_shape(run, *arrays)[2]
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), residuals)  # its backward needs none of them
        return *linear_attention_xla.attend(feature_map, key_lag, *arrays), empty

    settled = _by_platform(kernel, run, plain if fall_back else None)
    shared = (3,) if _is_shared(initial_state) else ()
    out, state, residuals = save_named(on_each_device(settled, replicated=shared, summed=())(*arrays))
    return LinearAttentionOutput(out, state), (*arrays, residuals)


def _backward(kernel, fall_back, feature_map, key_lag, kept_arrays, d_attended: LinearAttentionOutput):
    initial_state = kept_arrays[3]

    def run(query, key, value, initial_state, documents, residuals, d_out, d_state):
        arrays = (residuals, query, key, value, d_out, d_state)
        options = _options(kernel, feature_map, key_lag, initial_state, documents)
        gradients = _module(kernel).linear_attention_backward(*arrays, **options)
        # A kernel that takes no initial state gives no gradient of one.
        return *gradients, *[None] * (4 - len(gradients))

    def plain(query, key, value, initial_state, documents, residuals, *d_attended):
        del residuals

        def attended(query, key, value, initial_state):
            return linear_attention_xla.attend(feature_map, key_lag, query, key, value, initial_state, documents)

        return jax.vjp(attended, query, key, value, initial_state)[1](LinearAttentionOutput(*d_attended))

    settled = _by_platform(kernel, run, plain if fall_back else None)
    shared, summed = ((3,), (3,)) if _is_shared(initial_state) else ((), ())
    gradients = on_each_device(settled, replicated=shared, summed=summed)(*kept_arrays, *d_attended)
    return *gradients, None


attend.defvjp(_forward, _backward)


def _is_shared(initial_state: Array | None) -> bool:
    return initial_state is not None and initial_state.shape[0] == 1


def _by_platform(kernel: str, run, plain):
    if plain is None:
        return run
    return lambda *arguments: jax.lax.platform_dependent(*arguments, default=plain, **{_PLATFORMS[kernel]: run})


def _options(kernel: str, feature_map, key_lag, initial_state, documents) -> dict[str, Any]:
    if kernel == "mosaic_gpu":
        return {"feature_map": feature_map, "key_lag": key_lag}
    card = {"capability": expected_capability()} if kernel == "triton" else {}
    return {"feature_map": feature_map, "initial_state": initial_state, "documents": documents, **card}


def _module(kernel: str) -> ModuleType:
    match kernel:
        case "triton":
            from pallas_kernels.linear_attention import (
                triton as linear_attention,  # imports Triton, which machines without a GPU may lack
            )
        case "mosaic_gpu":
            from pallas_kernels.linear_attention import mosaic_gpu as linear_attention
        case _:
            from pallas_kernels.linear_attention import tpu as linear_attention
    return linear_attention
