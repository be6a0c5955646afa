"""Layers without a memory of other tokens: projections, norms and their initial values."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from rat_jax.mesh import TENSOR_AXIS, num_parts
from rat_jax.ops.normed_product import normed_product
from rat_jax.ops.normed_product_xla import multiply_parts, multiply_rows, rms_norm
from rat_jax.ops.residual_norm import ResidualNormOutput, residual_norm
from rat_jax.shapes import Array, Float, Float32

NORM_EPSILON = 1e-6  # of the release
INITIAL_STD = 0.02  # of every weight matrix of the release, the embedding too
_WIDEST_READING = 8  # rows of x that are so many times wider than a part take longer to read than to multiply


def projection(inputs: int, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """x W without bias, W of shape (inputs, outputs) from Normal(0, 0.02); products in `dtype`, W in float32."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        dtype=dtype,
        param_dtype=jnp.float32,
        kernel_init=nnx.initializers.normal(INITIAL_STD),
        dot_general=multiply_rows,
        rngs=rngs,
    )


class RmsNorm(nnx.Module):
    """x / sqrt(mean(x^2) + 1e-6) * scale over the channels (arXiv 1910.07467), in float32, returned in x's dtype."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(self, x: Float[Array, "*axes D"]) -> Float[Array, "*axes D"]:
        """Normalises every vector of D channels."""
        return rms_norm(x, self.scale[...], NORM_EPSILON)

    def beside_residual(
        self, x: Float[Array, "B T D"], added: Float[Array, "B T D"] | None = None
    ) -> ResidualNormOutput:
        """x + added, for the sum around a layer, and the same normed: in one pass, as their gradients are."""
        return residual_norm(x, self.scale[...], added=added, epsilon=NORM_EPSILON)


@dataclasses.dataclass(frozen=True)
class Ahead:
    """What is put off until a projection of single tokens, to run both in one launch, or has been done with it."""

    norm: RmsNorm  # of the projection's input
    product: Float[Array, "B T _"] | None = None  # of the normed input with all of the projection's matrix


def has_matrix_alone(linear: nnx.Module) -> bool:
    """Whether a projection is nothing but the product with its `kernel`, which others may then multiply."""
    return type(linear) is nnx.Linear and not linear.use_bias


def project(linear: nnx.Linear, x: Float[Array, "B T D"], ahead: Ahead | None = None) -> Float[Array, "B T c"]:
    """x W, or of normed x."""
    if ahead is None:
        return linear(x)
    if ahead.product is not None:
        return ahead.product
    if not has_matrix_alone(linear):
        return linear(ahead.norm(x))
    matrix, scale = linear.kernel[...], ahead.norm.scale[...]
    return normed_product(x, scale, matrix, epsilon=NORM_EPSILON, dtype=linear.dtype)


def project_parts(linear: nnx.Linear, x: Float[Array, "B T D"], *sizes, ahead: Ahead | None = None) -> list:
    """As `project`, as arrays [B, T, size]; where the mesh in use cuts heads, each is cut among its devices.

    Each part is a product of its own, so that kernels read it as it lies. A single token, which is one launch, and
    parts too narrow to pay for another reading of x are cut out of one product.
    """
    borders = list(itertools.accumulate(sizes))[:-1]
    is_whole = num_parts(TENSOR_AXIS) == 1
    if is_whole and (x.shape[1] == 1 or min(sizes) * _WIDEST_READING < linear.in_features):
        return jnp.split(project(linear, x, ahead), borders, axis=-1)
    x = x if ahead is None else ahead.norm(x)
    matrix = linear.kernel[...].astype(linear.dtype)
    if is_whole:
        return multiply_parts(x.astype(linear.dtype), matrix, sizes)
    return [_product(x, _cut_columns(part)) for part in jnp.split(matrix, borders, axis=1)]


def project_interleaved(
    linear: nnx.Linear, x: Float[Array, "B T D"], cut: tuple, whole: int, ahead: Ahead | None = None
) -> Float[Array, "B T _"]:
    """As `project`; where heads are cut, each device's share of each part of `cut` channels, and the last `whole`.

    Devices follow one another. The matrix is reordered, not the products.
    """
    if num_parts(TENSOR_AXIS) == 1:
        return project(linear, x, ahead)
    x = x if ahead is None else ahead.norm(x)
    return _product(x, _interleaved(linear.kernel[...].astype(linear.dtype), cut, whole))


def project_groups(linear: nnx.Linear, x: Float[Array, "B T D"], *groups) -> list:
    """x W as an array [B, T, sum(sizes)] for each group of sizes, interleaved as by `project_interleaved`.

    Each is a product of its own, so that their gradients are not put together before the backward pass multiplies them;
    what is put together are the columns of the gradient of W. Single tokens are one product, if no heads are cut.
    """
    borders = list(itertools.accumulate(map(sum, groups)))[:-1]
    is_whole = num_parts(TENSOR_AXIS) == 1
    if is_whole and x.shape[1] == 1:
        return jnp.split(linear(x), borders, axis=-1)
    kernels = jnp.split(linear.kernel[...].astype(linear.dtype), borders, axis=1)
    if not is_whole:
        kernels = [_interleaved(part, sizes, whole=0) for part, sizes in zip(kernels, groups, strict=True)]
    return [_product(x, part) for part in kernels]


def _interleaved(kernel: Float[Array, "D c"], cut: tuple, whole: int) -> Float[Array, "D _"]:
    """Columns as `project_interleaved` says, cut among the devices that have heads."""
    count = num_parts(TENSOR_AXIS)
    *parts, shared = jnp.split(kernel, list(itertools.accumulate(cut)), axis=1)
    rows = [part.reshape(part.shape[0], count, -1) for part in parts]
    rows.append(jnp.broadcast_to(shared[:, None], (shared.shape[0], count, whole)))
    return _cut_columns(jnp.concatenate(rows, axis=2).reshape(shared.shape[0], -1))


def _cut_columns(matrix: Float[Array, "D c"]) -> Float[Array, "D c"]:
    return jax.lax.with_sharding_constraint(matrix, PartitionSpec(None, TENSOR_AXIS))


def _product(rows: Float[Array, "B T D"], matrix: Float[Array, "D c"]) -> Float[Array, "B T c"]:
    return multiply_rows(rows.astype(matrix.dtype), matrix)


def chrono_gate_bias(key: Array, width: int, max_timescale: int) -> Float32[Array, " D"]:
    """Forget-gate biases log(Uniform(1, max_timescale - 1)): memories of 1 .. max_timescale tokens (arXiv 1804.11188).

    A recurrence no longer than two tokens has no such range and starts from 0.
    """
    if max_timescale <= 2:
        return jnp.zeros((width,), jnp.float32)
    return jnp.log(jax.random.uniform(key, (width,), jnp.float32, 1.0, max_timescale - 1.0))
