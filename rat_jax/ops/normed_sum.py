"""The sum of two arrays of heads, each normed head by head, in one pass over memory where a kernel runs."""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from pallas_kernels.normed_sum import triton_tiling
from pallas_kernels.normed_sum.shape import NormedSumShape
from rat_jax.ops import cut, dispatch, normed_sum_xla
from rat_jax.shapes import Array, Float, Float32

NormedSumImplementation = Literal["xla", "triton"]

_FASTEST_FIRST = ("triton",)


def normed_sum(
    first: Float[Array, "B T N H"],
    second: Float[Array, "B T N H"],
    first_scale: Float32[Array, " c"],
    second_scale: Float32[Array, " c"],
    *,
    epsilon: float,
    implementation: NormedSumImplementation | None = None,
) -> Float[Array, "B T N H"]:
    """out = s a / sqrt(mean(a^2) + epsilon) + r b / sqrt(mean(b^2) + epsilon), means over each head's H channels.

    Norms and their sum are float32 (arXiv 1910.07467), the result has the dtype of `first`.

    Args:
      first, second: a and b.
      first_scale, second_scale: s and r, of all c = N H channels.
      epsilon: above 0.
      implementation: None takes the fastest kernel of the platform that the program is lowered for where it takes the
        call, and "xla" elsewhere and for one token, which XLA joins with what surrounds it.

    Raises:
      ValueError: if shapes do not fit, or epsilon is not above 0.
      UnsupportedError: if a named implementation cannot run the call; the message says why and what comes nearest.
    """
    dispatch.check_implementation(implementation, NormedSumImplementation)
    dispatch.check_floating(first=first, second=second, first_scale=first_scale, second_scale=second_scale)
    dispatch.check_heads(first=first, second=second)
    batch, tokens, heads, head_dim = first.shape
    dispatch.check_whole(1, rows=batch, tokens=tokens)
    if second.shape != first.shape:
        raise ValueError(f"first and second must have one shape, got {first.shape} and {second.shape}")
    for name, scale in (("first_scale", first_scale), ("second_scale", second_scale)):
        if scale.shape != (heads * head_dim,):
            raise ValueError(f"{name} must be [N H] = ({heads * head_dim},), got {scale.shape}")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, got {epsilon}")
    if cut.is_cut():
        options = {"epsilon": epsilon, "implementation": implementation}
        arrays = (first, second, first_scale, second_scale)
        return cut.run(lambda *parts: normed_sum(*parts, **options), ("BTN", "BTN", "N", "N"), "BTN", *arrays)
    rows = dispatch.rows_of_device(batch)
    shape = NormedSumShape(rows * tokens, heads, head_dim, first.dtype.name, epsilon)

    def unsupported_reason(name: str) -> str | None:
        if first.dtype != second.dtype:
            return f"first and second differ in dtype: {first.dtype}, {second.dtype}"
        return triton_tiling.unsupported_reason(shape)

    order = _FASTEST_FIRST if tokens > 1 else ()
    chosen = dispatch.choose(implementation, order, batch, unsupported_reason)
    arrays = (first, second, first_scale, second_scale)
    if chosen == "xla":
        return normed_sum_xla.add(*arrays, epsilon)
    (out,) = dispatch.run(Add(chosen, shape), implementation is None, *arrays)
    return out


@dataclasses.dataclass(frozen=True)
class Add(dispatch.Kernel):
    """Of both arrays and their scales: the sum of the normed."""

    implementation: str
    shape: NormedSumShape
    replicated: ClassVar[tuple[int, ...]] = (2, 3)
    num_differentiated: ClassVar[int] = 4
    recomputed: ClassVar[bool] = True  # two arrays that are saved are all that it takes

    def forward(
        self, first: Array, second: Array, first_scale: Array, second_scale: Array
    ) -> tuple[tuple[Array], None]:
        from pallas_kernels.normed_sum import triton  # imports Triton, which machines without a GPU may lack

        out = triton.forward(self.shape, *self._flat(first, second), *_float32(first_scale, second_scale))
        return (out.reshape(first.shape),), None

    def plain(self, first: Array, second: Array, first_scale: Array, second_scale: Array) -> tuple[Array]:
        return (normed_sum_xla.add(first, second, first_scale, second_scale, self.shape.epsilon),)

    def backward(self, arguments, saved, residuals, d_results) -> tuple[Array, Array, Array, Array]:
        from pallas_kernels.normed_sum import triton

        del saved, residuals
        first, second, *scales = arguments
        (d_out,) = d_results
        *flat, d_out = self._flat(first, second, d_out.astype(first.dtype))
        d_first, d_second, *d_scales = triton.backward(self.shape, *flat, *_float32(*scales), d_out)
        d_scales = (d.astype(scale.dtype) for d, scale in zip(d_scales, scales, strict=True))
        return d_first.reshape(first.shape), d_second.reshape(second.shape), *d_scales

    def _flat(self, *arrays: Array) -> list[Array]:
        return [x.reshape(self.shape.tokens, self.shape.heads * self.shape.head_dim) for x in arrays]


def _float32(*scales: Array) -> list[Array]:
    return [scale.astype(jnp.float32) for scale in scales]
