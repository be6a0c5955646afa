"""The RAT mixing op by kernels: differentiable functions over the kernels of every platform."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rat_jax.ops import rat_xla
from rat_jax.ops.platform import devices, expected_capability, expected_platform, on_each_device
from rat_jax.ops.rat_types import RatOutput, RatSizes, RatState
from rat_jax.ops.remat import save_named
from rat_jax.segments import SegmentInfo
from rat_jax.shapes import Array, Float, Float32

# "gpu" is Triton with the fastest bodies of the attention to summaries; the other names are implementations of the op.
_PLATFORMS = {"gpu": "cuda", "triton": "cuda", "mosaic_gpu": "cuda", "cudnn": "cuda", "pallas_tpu": "tpu"}


def candidate() -> str | None:
    """The kernel that is worth tracing here; which body runs is settled when the program is lowered."""
    match expected_platform():
        case "gpu" | "cuda":
            return "gpu"
        case "tpu":
            return "pallas_tpu"
        case _:
            return None


def refusal(
    kernel: str,
    sizes: RatSizes,
    projected: Float[Array, "B T X"],
    segments: SegmentInfo,
    state: RatState | None,
) -> str | None:
    """Why a kernel cannot run a call and what comes nearest; None where it can."""
    if state is not None and kernel not in ("gpu", "triton"):
        return "it takes no state; implementations 'triton' and 'xla' do"
    if projected.shape[0] % devices():
        return f"{projected.shape[0]} batch rows do not divide among the {devices()} devices of the mesh"
    if _PLATFORMS[kernel] == "cuda":
        from pallas_kernels.rat import select
        from pallas_kernels.rat import shape as problem

        call = _problem(sizes, projected, segments)
        reason = problem.refusal(call)
        return select.refusal(kernel, call) if reason is None and kernel != "gpu" else reason
    from pallas_kernels.rat import tpu

    return tpu.refusal(
        projected.shape, projected.dtype, width=sizes.width, num_groups=sizes.num_groups, rope_base=sizes.rope_base
    )


def _problem(sizes: RatSizes, projected: Float[Array, "B T X"], segments: SegmentInfo):
    from pallas_kernels.rat import shape as problem

    call = problem.problem_of(
        projected.shape,
        projected.dtype.name,
        num_heads=sizes.num_heads,
        num_groups=sizes.num_groups,
        chunk_size=sizes.chunk_size,
        rope=sizes.rope_base is not None,
        segmented=not segments.contiguous,
    )
    return dataclasses.replace(call, capability=expected_capability())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def mix(
    kernel: str,
    fall_back: bool,
    sizes: RatSizes,
    projected: Float[Array, "B T 3*D+2*G*H"],
    gate_bias: Float32[Array, " D"],
    segments: SegmentInfo,
) -> Float[Array, "B T D"]:
    """See `rat_jax.ops.rat.rat_mix`. On the devices of a mesh, each runs the kernels on its own batch rows.

    Args:
      kernel: one of `_PLATFORMS`.
      fall_back: lowered for another platform than the kernel's, run the plain XLA body instead.
      sizes: of the op.
      projected: z, v, g, q, k.
      gate_bias: of the forget gate.
      segments: of the tokens.
    """
    return _forward(kernel, fall_back, sizes, projected, gate_bias, segments)[0]


def _forward(kernel, fall_back, sizes, projected, gate_bias, segments):
    def run(*arguments):
        out, residuals = _kernel_forward(kernel, sizes, *arguments)
        return out, residuals._replace(out=None)  # kept once, not twice

    def plain(projected, gate_bias, segments):
        residuals = jax.eval_shape(run, projected, gate_bias, segments)[1]
        out = rat_xla.mix(sizes, projected, gate_bias, segments).out
        return out, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), residuals)  # its backward needs none of them

    settled = _by_platform(kernel, run, plain if fall_back else None)
    out, residuals = save_named(on_each_device(settled, replicated=(1,), summed=())(projected, gate_bias, segments))
    return out, (out, residuals, projected, gate_bias, segments)


def _backward(kernel, fall_back, sizes, residuals, d_out):
    def run(out, residuals, *arguments):
        return _kernel_backward(kernel, sizes, residuals._replace(out=out), *arguments)

    def plain(out, residuals, projected, gate_bias, segments, d_out):
        del out, residuals
        _, pull = jax.vjp(lambda p, b: rat_xla.mix(sizes, p, b, segments).out, projected, gate_bias)
        return pull(d_out)

    settled = _by_platform(kernel, run, plain if fall_back else None)
    d_projected, d_gate_bias = on_each_device(settled, replicated=(3,), summed=(1,))(*residuals, d_out)
    return d_projected, d_gate_bias, None


mix.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def extend(
    kernel: str,
    fall_back: bool,
    sizes: RatSizes,
    projected: Float[Array, "B T 3*D+2*G*H"],
    gate_bias: Float32[Array, " D"],
    segments: SegmentInfo,
    state: RatState,
) -> RatOutput:
    """Tokens that follow a state, which is updated in place where it is donated; other arguments as those of `mix`."""
    settled = _by_platform(
        kernel,
        lambda *arguments: _kernel_extend(sizes, *arguments),
        (lambda *arguments: rat_xla.mix(sizes, *arguments)) if fall_back else None,
    )
    return RatOutput(*on_each_device(settled, replicated=(1,), summed=())(projected, gate_bias, segments, state))


def _extend_forward(kernel, fall_back, sizes, *arguments):
    return extend(kernel, fall_back, sizes, *arguments), arguments


def _extend_backward(kernel, fall_back, sizes, arguments, d_mixed):
    _, pull = jax.vjp(functools.partial(rat_xla.mix, sizes), *arguments)  # rarely wanted: plain XLA will do
    return pull(d_mixed)


extend.defvjp(_extend_forward, _extend_backward)


def _by_platform(kernel: str, run, plain):
    if plain is None:
        return run
    return lambda *arguments: jax.lax.platform_dependent(*arguments, default=plain, **{_PLATFORMS[kernel]: run})


def _kernel_forward(kernel: str, sizes: RatSizes, projected, gate_bias, segments) -> tuple[Array, Any]:
    if kernel != "pallas_tpu":
        from pallas_kernels.rat import triton  # imports Triton, which machines without a GPU may lack

        return triton.rat_forward(projected, gate_bias, **_gpu_options(kernel, sizes, projected, segments))
    from pallas_kernels.rat import tpu

    return tpu.rat_forward(projected, gate_bias, **_options(sizes), **_documents(segments))


def _kernel_backward(
    kernel: str, sizes: RatSizes, residuals, projected, gate_bias, segments, d_out
) -> tuple[Array, Array]:
    if kernel != "pallas_tpu":
        from pallas_kernels.rat import triton

        return triton.rat_backward(
            residuals, projected, gate_bias, d_out, **_gpu_options(kernel, sizes, projected, segments)
        )
    from pallas_kernels.rat import tpu

    return tpu.rat_backward(residuals, projected, gate_bias, d_out, **_options(sizes), **_documents(segments))


def _gpu_options(kernel: str, sizes: RatSizes, projected, segments: SegmentInfo) -> dict[str, Any]:
    from pallas_kernels.rat.select import fastest

    call = _problem(sizes, projected, segments)
    implementation = fastest(call) if kernel == "gpu" else kernel
    sizes_and_places = _options(sizes) | _documents(segments) | {"num_heads": sizes.num_heads}
    return sizes_and_places | {"implementation": implementation, "capability": call.capability}


def _kernel_extend(sizes: RatSizes, projected, gate_bias, segments: SegmentInfo, state: RatState) -> RatOutput:
    from pallas_kernels.rat.triton import rat_extend
    from pallas_kernels.rat.triton_decode import rat_decode

    pair, summaries = (state.key, state.value), (state.summary_key, state.summary_value)
    options = _options(sizes) | {"num_heads": sizes.num_heads}
    if projected.shape[1] > 1:
        places = (state.summary_segment_ids, state.num_summaries, segments.segment_ids, segments.positions)
        capability = expected_capability()
        out, new = rat_extend(projected, gate_bias, *pair, *summaries, *places, **options, capability=capability)
        return RatOutput(out, RatState(*new))
    position, segment_id, is_token = (x[:, 0] for x in (segments.positions, segments.segment_ids, segments.is_token))
    out, *new = rat_decode(projected, gate_bias, *pair, *summaries, position, state.num_summaries, is_token, **options)
    completed = segments.ends(sizes.chunk_size)[:, 0]
    slots = jnp.where(completed, state.num_summaries, state.summary_segment_ids.shape[1])
    segment_ids = state.summary_segment_ids.at[jnp.arange(slots.shape[0]), slots].set(segment_id, mode="drop")
    return RatOutput(out, RatState(*new, segment_ids, state.num_summaries + completed.astype(jnp.int32)))


def _options(sizes: RatSizes) -> dict[str, Any]:
    return {"num_groups": sizes.num_groups, "chunk_size": sizes.chunk_size, "rope_base": sizes.rope_base}


def _documents(segments: SegmentInfo) -> dict[str, Array]:
    return {} if segments.contiguous else {"segment_ids": segments.segment_ids, "positions": segments.positions}
