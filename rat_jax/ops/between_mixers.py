"""From a mixer's result to the next mixer's projection, for single tokens, which decoding of few rows runs at once."""

import dataclasses
import functools
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.between_mixers import mosaic_gpu_tiling
from pallas_kernels.between_mixers.shape import BetweenMixersShape
from rat_jax.mesh import constrain_stream
from rat_jax.ops import cut, dispatch, platform
from rat_jax.ops.normed_product import normed_product
from rat_jax.ops.normed_product_xla import multiply_rows
from rat_jax.shapes import Array, Float, Float32

BetweenMixersImplementation = Literal["xla", "mosaic_gpu"]

_FASTEST_FIRST = ("mosaic_gpu",)


class NormedMatrix(NamedTuple):
    """A norm's scale, and the matrix that multiplies what it gives."""

    scale: Float32[Array, " D"]
    matrix: Float[Array, "D _"]


class BetweenMixersOutput(NamedTuple):
    """The stream, and the next mixer's projection of it where one follows."""

    x: Float[Array, "B 1 D"]
    product: Float[Array, "B 1 _"] | None


def between_mixers(
    mixed: Float[Array, "B 1 c"],
    x: Float[Array, "B 1 D"],
    out: Float[Array, "c D"],
    up: NormedMatrix,
    down: Float[Array, "F D"],
    following: NormedMatrix | None = None,
    *,
    epsilon: float,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: BetweenMixersImplementation | None = None,
) -> BetweenMixersOutput:
    """u = x + mixed W_out; y = u + gelu(norm(u) W_up) W_down; norm(y) W_next, where a mixer follows.

    Norms are u / sqrt(mean(u^2) + epsilon) * scale (arXiv 1910.07467) with scales of their own, the GELU is the exact
    (erf) one (arXiv 1606.08415). Products take place in `dtype`, their sums in float32. The kernel, which one launch of
    programs that wait for each other is, rounds u, the GELU's result, y and the last product to it, plain XLA every
    product and what is normed as well.

    Args:
      mixed: of the mixer, before its output's projection.
      x: the stream in front of the mixer.
      out: W_out of the mixer, cast to `dtype` as all matrices are.
      up: the scale of the MLP's norm, and W_up.
      down: W_down.
      following: the scale of the next mixer's norm, and the matrix of its projection.
      epsilon: above 0.
      dtype: of products and results; None: that of x.
      implementation: None takes "mosaic_gpu" on a Hopper GPU for at most 2 rows in bfloat16 or float16, outside of
        meshes of several devices, where strips of 64 columns of every matrix, those of `out` and `down` in as many
        parts as fit, are at least 88 (two thirds of a large card's multiprocessors) and no more than the card has;
        elsewhere plain XLA, whose normed products may be kernels of their own (`normed_product`), which "xla" by name
        rules out.

    Raises:
      ValueError: if shapes do not fit, or epsilon is not above 0.
      UnsupportedError: if a named implementation cannot run the call; the message says why and what comes nearest.
    """
    dispatch.check_implementation(implementation, BetweenMixersImplementation)
    normed = {"up": up} | ({"following": following} if following else {})
    matrices = {"out": out, "down": down} | {name: by.matrix for name, by in normed.items()}
    dispatch.check_floating(mixed=mixed, x=x, **matrices)
    dispatch.check_floating(**{f"the scale of {name}": by.scale for name, by in normed.items()})
    width, hidden = x.shape[-1:], up.matrix.shape[1:]
    wanted = {"out": mixed.shape[2:] + width, "up": width + hidden, "down": hidden + width}
    wanted |= {"following": width + following.matrix.shape[1:]} if following else {}
    if x.ndim != 3 or x.shape[1] != 1 or mixed.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"mixed must be [B, 1, c] and x [B, 1, D], got {mixed.shape} and {x.shape}")
    for name, matrix in matrices.items():
        if matrix.ndim != 2 or matrix.shape != wanted[name]:
            raise ValueError(f"the matrix of {name} must be {wanted[name]} beside the others, got {matrix.shape}")
    for name, by in normed.items():
        if by.scale.shape != width:
            raise ValueError(f"the scale of {name} must be {width}, got {by.scale.shape}")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, got {epsilon}")
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    shape = BetweenMixersShape(
        rows=x.shape[0],
        inputs=mixed.shape[2],
        width=x.shape[2],
        hidden=down.shape[0],
        outputs=following.matrix.shape[1] if following else 0,
        dtype=dtype.name,
        capability=platform.expected_capability(),
        multiprocessors=platform.expected_multiprocessors(),
    )

    def unsupported_reason(name: str) -> str | None:
        if (reason := cut.several_devices_reason()) is not None:
            return reason
        if x.dtype != dtype:
            return f"x is {x.dtype.name} and the products {dtype.name}; cast x, or take implementation 'xla'"
        return mosaic_gpu_tiling.unsupported_reason(shape)

    is_known = shape.multiprocessors is not None  # too few of them would be waited for without end
    order = _FASTEST_FIRST if is_known and mosaic_gpu_tiling.fills_card(shape) else ()
    mixed, out, down = (array.astype(dtype) for array in (mixed, out, down))
    if dispatch.choose(implementation, order, x.shape[0], unsupported_reason) == "xla":
        return _by_products(mixed, x, out, up, down, following, epsilon, dtype, implementation)
    kernel = BetweenMixers("mosaic_gpu", shape, epsilon)
    found = dispatch.run(kernel, implementation is None, mixed, x, out, up, down, following)
    return BetweenMixersOutput(found[0], found[1] if following else None)


def _by_products(
    mixed: Array,
    x: Array,
    out: Array,
    up: NormedMatrix,
    down: Array,
    following: NormedMatrix | None,
    epsilon: float,
    dtype: jnp.dtype,
    implementation: Literal["xla"] | None,
) -> BetweenMixersOutput:
    """A product after the other; the implementation is that of the normed ones."""

    def normed(x: Array, by: NormedMatrix, **options: bool) -> Array:
        return normed_product(x, *by, epsilon=epsilon, dtype=dtype, implementation=implementation, **options)

    x = constrain_stream(x + multiply_rows(mixed, out))
    x = constrain_stream(x + multiply_rows(normed(x, up, gelu=True), down))
    return BetweenMixersOutput(x, normed(x, following) if following else None)


@dataclasses.dataclass(frozen=True)
class BetweenMixers(dispatch.Kernel):
    """Of the op's arguments: its results; made for decoding, so that gradients are plain XLA's."""

    implementation: str
    shape: BetweenMixersShape
    epsilon: float
    replicated: ClassVar[tuple[int, ...]] = (2, 3, 4, 5)
    num_differentiated: ClassVar[int] = 0

    def forward(
        self,
        mixed: Array,
        x: Array,
        out: Array,
        up: NormedMatrix,
        down: Array,
        following: NormedMatrix | None,
    ) -> tuple[tuple[Array, ...], None]:
        from pallas_kernels.between_mixers import mosaic_gpu  # imports Pallas, which takes a while

        dtype = self.shape.dtype
        following = (following.scale, following.matrix.astype(dtype)) if following else None
        rows = mixed[:, 0], x[:, 0]
        # Element by element under `jax.vmap`: the launch has one set of semaphores, and needs the whole card.
        launch = jax.custom_batching.sequential_vmap(
            functools.partial(mosaic_gpu.run, self.shape, epsilon=self.epsilon)
        )
        found = launch(*rows, up.scale, out, up.matrix.astype(dtype), down, following)
        return tuple(value[:, None] for value in found), None

    def plain(self, *arguments: Any) -> tuple[Array, ...]:
        found = _by_products(*arguments, self.epsilon, jnp.dtype(self.shape.dtype), "xla")
        return (found.x,) if found.product is None else tuple(found)
