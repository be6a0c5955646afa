"""A norm whose input goes around the layer as well, by Triton kernels on one device, for GPUs.

What the layer before gave is added to the stream, x = u + a, and y = s n is what the next one is given, with
n = x / sqrt(mean(x^2) + epsilon) over the D channels of a token (arXiv 1910.07467). With c the gradient of x from where
it goes around the layer, d that of y, and g = s d,

    dx = c + (g - n mean(g n)) / sqrt(mean(x^2) + epsilon),    ds = sum d n over the tokens,

and du = da = dx; all in float32 whatever the dtype of the tokens, of x as it is rounded to it. `residual_norm_forward`
reads and writes two arrays. `residual_norm_backward` reads three, writes one and sums ds over the tokens of each of its
programs. Lowered text shows the names.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.launch import triton as launcher
from pallas_kernels.launch.sizes import cdiv, next_power_of_2
from pallas_kernels.launch.triton import Launch
from pallas_kernels.residual_norm.shape import ResidualNormShape
from pallas_kernels.residual_norm.triton_tiling import rows_of, tiles_of, warps_of


def forward(shape: ResidualNormShape, x: jax.Array, added: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x + added, and the same normed.

    Args:
      shape: sizes for which `triton_tiling.unsupported_reason` has no reason.
      x, added: u and a, [tokens, D], bfloat16, float16 or float32.
      scale: s, [D] float32.
    """
    return launcher.run(forward_launch(shape), x, added, scale)


def backward(
    shape: ResidualNormShape, d_around: jax.Array, d_normed: jax.Array, x: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of x and of the scale.

    Args:
      shape: sizes for which `triton_tiling.unsupported_reason` has no reason.
      d_around, d_normed, x: c, d and x, [tokens, D], bfloat16, float16 or float32.
      scale: s, [D] float32.

    Returns:
      [tokens, D] in the dtype of x, and [D] float32.
    """
    launch = backward_launch(shape, tiles_of(shape))
    d_x, d_scale = launcher.run(launch, d_around, d_normed, x, scale)
    return d_x, jnp.sum(d_scale, axis=0)


@triton.jit(do_not_specialize=["tokens"])
def residual_norm_forward(
    x,  # [tokens, D]: u
    added,  # [tokens, D]: a
    scale,  # [D] float32: s
    tokens,  # of all rows
    around,  # [tokens, D]: u + a
    normed,  # [tokens, D]: y
    D: tl.constexpr,
    EPSILON: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS tokens: programs that take several tiles in turn are slower (docs/lab_notes.md)."""
    channel = tl.arange(0, BLOCK)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at, use = token * D + channel[None, :], (token < tokens) & (channel[None, :] < D)
    value = tl.load(x + at, mask=use, other=0.0).to(tl.float32)
    value = (value + tl.load(added + at, mask=use, other=0.0).to(tl.float32)).to(around.dtype.element_ty)
    tl.store(around + at, value, mask=use)
    value = value.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) * (1.0 / D) + EPSILON)[:, None]
    s = tl.load(scale + channel, mask=channel < D, other=0.0)[None, :]
    tl.store(normed + at, (value * inverse * s).to(normed.dtype.element_ty), mask=use)


@triton.jit(do_not_specialize=["tokens"])
def residual_norm_backward(
    d_around,  # [tokens, D]: c
    d_normed,  # [tokens, D]: d
    x,  # [tokens, D]
    scale,  # [D] float32: s
    tokens,  # of all rows
    d_x,  # [tokens, D]
    d_scale,  # [spans of TILES ROWS tokens, D] float32
    D: tl.constexpr,
    EPSILON: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """TILES times ROWS tokens, in tiles of BLOCK channels."""
    span = tl.program_id(0)
    channel = tl.arange(0, BLOCK)
    s = tl.load(scale + channel, mask=channel < D, other=0.0)[None, :]
    s_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(0, TILES, num_stages=3):  # two tiles are copied to shared memory ahead of their use
        token = (span.to(tl.int64) * TILES + tile) * ROWS + tl.arange(0, ROWS)[:, None]
        at, use = token * D + channel[None, :], (token < tokens) & (channel[None, :] < D)
        value = tl.load(x + at, mask=use, other=0.0).to(tl.float32)
        d = tl.load(d_normed + at, mask=use, other=0.0).to(tl.float32)
        around = tl.load(d_around + at, mask=use, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(value * value, axis=1) * (1.0 / D) + EPSILON)[:, None]
        normed, scaled = value * inverse, s * d
        mean = (tl.sum(scaled * normed, axis=1) * (1.0 / D))[:, None]
        tl.store(d_x + at, (around + inverse * (scaled - normed * mean)).to(d_x.dtype.element_ty), mask=use)
        s_sum += d * normed
    tl.store(d_scale + span.to(tl.int64) * D + channel, tl.sum(s_sum, axis=0), mask=channel < D)


def forward_launch(shape: ResidualNormShape) -> Launch:
    """`residual_norm_forward`; the inputs are those of the kernel in their order."""
    tokens = ((shape.tokens, shape.width), shape.dtype)
    return Launch(
        kernel=residual_norm_forward,
        grid=(cdiv(shape.tokens, rows_of(shape)),),
        integers=(shape.tokens,),
        outputs=(tokens, tokens),
        constants=_constants(shape),
        num_warps=warps_of(shape),
        num_stages=1,
    )


def backward_launch(shape: ResidualNormShape, tiles: int) -> Launch:
    """`residual_norm_backward`; the inputs are those of the kernel in their order."""
    spans = cdiv(shape.tokens, rows_of(shape) * tiles)
    return Launch(
        kernel=residual_norm_backward,
        grid=(spans,),
        integers=(shape.tokens,),
        outputs=(((shape.tokens, shape.width), shape.dtype), ((spans, shape.width), "float32")),
        constants=(*_constants(shape), ("TILES", tiles)),
        num_warps=warps_of(shape),
        num_stages=1,
    )


def _constants(shape: ResidualNormShape) -> tuple[tuple[str, int | float], ...]:
    return (
        ("D", shape.width),
        ("EPSILON", shape.epsilon),
        ("ROWS", rows_of(shape)),
        ("BLOCK", next_power_of_2(shape.width)),
    )
