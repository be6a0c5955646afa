"""Causal softmax attention of whole rows by cuDNN, differentiable."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from pallas_kernels.attention import cudnn_fmha as call
from rat_jax.ops.attention_types import AttentionOutput, KeyInfo
from rat_jax.ops.platform import devices, expected_capability, expected_platform, on_each_device
from rat_jax.ops.remat import save_named
from rat_jax.shapes import Array, Float

_OLDEST = (8, 0)  # compute capability
Plain = Callable[[int | None, Array, Array, Array], AttentionOutput]  # of window, query, key and value


def is_candidate() -> bool:
    """Whether the program is traced for devices that have cuDNN's attention; the body is settled at lowering."""
    capability = expected_capability()
    return expected_platform() in ("gpu", "cuda") and (capability is None or capability >= _OLDEST)


def refusal(query: Array, key: Array, value: Array, query_info: KeyInfo, key_info: KeyInfo) -> str | None:
    """Why cuDNN cannot run a call and what comes nearest; None where it can."""
    if not (query_info.contiguous and key_info.contiguous and query.shape[1] == key.shape[1]):
        return "queries and keys must be known to be the same whole rows: one document each, no padding, no cache"
    if not query.dtype == key.dtype == value.dtype:
        return f"queries, keys and values differ in dtype: {query.dtype}, {key.dtype}, {value.dtype}"
    if query.shape[0] % devices():
        return f"{query.shape[0]} batch rows do not divide among the {devices()} devices of the mesh"
    return call.refusal(query.dtype.name, *query.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend(
    plain: Plain,
    fall_back: bool,
    window: int | None,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
) -> AttentionOutput:
    """See `rat_jax.ops.attention.attention`. On the devices of a mesh, each attends in its own batch rows.

    Args:
      plain: the XLA body.
      fall_back: lowered for another platform than CUDA, run the plain body instead.
      window: of the op.
      query, key, value: of contiguous rows.
    """

    def run(query, key, value):
        out, log_sum_exp = call.forward(query, key, value, **_options(query, window))
        return out, log_sum_exp.transpose(0, 2, 1)

    def otherwise(*arguments):
        return tuple(plain(window, *arguments))

    return AttentionOutput(*_settled(run, otherwise if fall_back else None)(query, key, value))


def _forward(plain: Plain, fall_back: bool, window: int | None, *arguments: CustomVJPPrimal):
    query, key, value = (argument.value for argument in arguments)
    attended = AttentionOutput(*save_named(attend(plain, fall_back, window, query, key, value)))
    return attended, (query, key, value, *attended)


def _backward(plain: Plain, fall_back: bool, window: int | None, residuals, d_attended: AttentionOutput):
    query, key, value, out, _ = residuals
    d_out, d_log_sum_exp = d_attended

    def plain_backward(query, key, value, d_out, d_log_sum_exp):
        return jax.vjp(functools.partial(plain, window), query, key, value)[1](AttentionOutput(d_out, d_log_sum_exp))

    def otherwise(query, key, value, out, log_sum_exp, d_out):
        del out
        return plain_backward(query, key, value, d_out, jnp.zeros_like(log_sum_exp))

    def run(query, key, value, out, log_sum_exp, d_out):
        options = _options(query, window)
        return call.backward(query, key, value, out, log_sum_exp.transpose(0, 2, 1), d_out, **options)

    if isinstance(d_out, SymbolicZero):
        d_out = jnp.zeros_like(out)
    if not isinstance(d_log_sum_exp, SymbolicZero):  # cuDNN has no gradient for it, and no mixer wants one
        return plain_backward(query, key, value, d_out, d_log_sum_exp)
    return _settled(run, otherwise if fall_back else None)(*residuals, d_out)


attend.defvjp(_forward, _backward, symbolic_zeros=True)


def _options(query: Array, window: int | None) -> dict[str, float | int | None]:
    reaches_all = window is not None and window >= query.shape[1] - 1
    return {"scale": 1 / math.sqrt(query.shape[3]), "window": None if reaches_all else window}


def _settled(run, otherwise):
    if otherwise is not None:
        run = functools.partial(jax.lax.platform_dependent, default=otherwise, cuda=run)
    return on_each_device(run, replicated=(), summed=())
