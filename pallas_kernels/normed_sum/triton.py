"""The sum of two arrays, each normed head by head, by Triton kernels: forward and backward on one device, for GPUs.

With the scales s and r of all channels of all heads, and for each head of each token over its H channels

    u = a / sqrt(mean(a^2) + epsilon),    v likewise of b,    out = s u + r v,

in float32 whatever the dtype of the arrays (arXiv 1910.07467). With d the gradient of `out` and g = s d,

    da = (g - u mean(g u)) / sqrt(mean(a^2) + epsilon),    ds = sum d u over the tokens,    db and dr likewise.

`normed_sum_forward` reads two arrays and writes one, `normed_sum_backward` reads three, writes two and sums the
gradients of the scales over the tokens of each of its programs. Lowered text shows the names.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.launch import triton as launcher
from pallas_kernels.launch.sizes import cdiv
from pallas_kernels.launch.triton import Launch
from pallas_kernels.normed_sum.shape import NormedSumShape
from pallas_kernels.normed_sum.triton_tiling import BACKWARD_NUMBERS, FORWARD_NUMBERS, NUM_WARPS, block_of, tiles_of


def forward(
    shape: NormedSumShape, first: jax.Array, second: jax.Array, first_scale: jax.Array, second_scale: jax.Array
) -> jax.Array:
    """The module's equation: [tokens, N H] in the dtype of the arrays.

    Args:
      shape: sizes for which `triton_tiling.unsupported_reason` has no reason.
      first, second: a and b, [tokens, N H], bfloat16, float16 or float32.
      first_scale, second_scale: s and r, [N H] float32.
    """
    return launcher.run(forward_launch(shape), first, second, first_scale, second_scale)[0]


def backward(
    shape: NormedSumShape,
    first: jax.Array,
    second: jax.Array,
    first_scale: jax.Array,
    second_scale: jax.Array,
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The gradients of the arguments of `forward`, each in its dtype, from `d_out` in that of the arrays."""
    launch = backward_launch(shape, tiles_of(shape))
    d_first, d_second, *d_scales = launcher.run(launch, first, second, first_scale, second_scale, d_out)
    return d_first, d_second, *(jnp.sum(d_scale, axis=0) for d_scale in d_scales)


@triton.jit(do_not_specialize=["tokens"])
def normed_sum_forward(
    first,  # [tokens, N H]: a
    second,  # [tokens, N H]: b
    first_scale,  # [N H] float32: s
    second_scale,  # [N H] float32: r
    tokens,  # of all rows
    out,  # [tokens, N H]
    N: tl.constexpr,
    H: tl.constexpr,
    EPSILON: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS tokens of one head, in a tile of BLOCK channels."""
    head, block = tl.program_id(0) % N, tl.program_id(0) // N
    channel = tl.arange(0, BLOCK)
    at, use = _place(block.to(tl.int64) * ROWS, tokens, head, channel, N, H, ROWS)
    a = tl.load(first + at, mask=use, other=0.0).to(tl.float32)
    b = tl.load(second + at, mask=use, other=0.0).to(tl.float32)
    s = tl.load(first_scale + head * H + channel, mask=channel < H, other=0.0)
    r = tl.load(second_scale + head * H + channel, mask=channel < H, other=0.0)
    total = s[None, :] * (a * _inverse(a, H, EPSILON)) + r[None, :] * (b * _inverse(b, H, EPSILON))
    tl.store(out + at, total.to(out.dtype.element_ty), mask=use)


@triton.jit(do_not_specialize=["tokens"])
def normed_sum_backward(
    first,  # [tokens, N H]: a
    second,  # [tokens, N H]: b
    first_scale,  # [N H] float32: s
    second_scale,  # [N H] float32: r
    d_out,  # [tokens, N H]: d
    tokens,  # of all rows
    d_first,  # [tokens, N H]
    d_second,  # [tokens, N H]
    d_first_scale,  # [spans of TILES ROWS tokens, N H] float32
    d_second_scale,  # likewise
    N: tl.constexpr,
    H: tl.constexpr,
    EPSILON: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    """TILES times ROWS tokens of one head."""
    head, span = tl.program_id(0) % N, tl.program_id(0) // N
    channel = tl.arange(0, BLOCK)
    s = tl.load(first_scale + head * H + channel, mask=channel < H, other=0.0)
    r = tl.load(second_scale + head * H + channel, mask=channel < H, other=0.0)
    s_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    r_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(TILES):
        at, use = _place((span.to(tl.int64) * TILES + tile) * ROWS, tokens, head, channel, N, H, ROWS)
        a = tl.load(first + at, mask=use, other=0.0).to(tl.float32)
        b = tl.load(second + at, mask=use, other=0.0).to(tl.float32)
        d = tl.load(d_out + at, mask=use, other=0.0).to(tl.float32)
        d_a, d_s = _gradients(a, s[None, :], d, H, EPSILON)
        tl.store(d_first + at, d_a.to(d_first.dtype.element_ty), mask=use)
        d_b, d_r = _gradients(b, r[None, :], d, H, EPSILON)
        tl.store(d_second + at, d_b.to(d_second.dtype.element_ty), mask=use)
        s_sum += d_s
        r_sum += d_r
    to = span.to(tl.int64) * (N * H) + head * H + channel
    tl.store(d_first_scale + to, tl.sum(s_sum, axis=0), mask=channel < H)
    tl.store(d_second_scale + to, tl.sum(r_sum, axis=0), mask=channel < H)


@triton.jit
def _place(start, tokens, head, channel, N: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr):
    """Where a tile lies in [tokens, N H], and what of it is inside."""
    token = start + tl.arange(0, ROWS)[:, None]
    return token * (N * H) + head * H + channel[None, :], (token < tokens) & (channel[None, :] < H)


@triton.jit
def _inverse(x, H: tl.constexpr, EPSILON: tl.constexpr):
    """1 / sqrt(mean(x^2) + epsilon) of every row of a tile."""
    return tl.rsqrt(tl.sum(x * x, axis=1) * (1.0 / H) + EPSILON)[:, None]


@triton.jit
def _gradients(x, scale, d, H: tl.constexpr, EPSILON: tl.constexpr):
    """Of an array and, before they are summed over tokens, of its scale."""
    inverse = _inverse(x, H, EPSILON)
    normed, scaled = x * inverse, scale * d
    mean = (tl.sum(scaled * normed, axis=1) * (1.0 / H))[:, None]
    return inverse * (scaled - normed * mean), d * normed


def forward_launch(shape: NormedSumShape) -> Launch:
    """`normed_sum_forward`; the inputs are those of the kernel in their order."""
    rows = FORWARD_NUMBERS // block_of(shape)
    whole = ((shape.tokens, shape.heads * shape.head_dim), shape.dtype)
    return _launch_of(normed_sum_forward, shape, rows, rows, (whole,), ())


def backward_launch(shape: NormedSumShape, tiles: int) -> Launch:
    """`normed_sum_backward`; the inputs are those of the kernel in their order."""
    rows = BACKWARD_NUMBERS // block_of(shape)
    width = shape.heads * shape.head_dim
    whole, sums = ((shape.tokens, width), shape.dtype), ((cdiv(shape.tokens, rows * tiles), width), "float32")
    constants = (("TILES", tiles),)
    return _launch_of(normed_sum_backward, shape, rows, rows * tiles, (whole, whole, sums, sums), constants)


def _launch_of(
    kernel, shape: NormedSumShape, rows: int, span: int, outputs: tuple, constants: tuple[tuple[str, Any], ...]
) -> Launch:
    """Of a kernel with a program for every head of every span of tokens; those of a span follow each other."""
    return Launch(
        kernel=kernel,
        grid=(cdiv(shape.tokens, span) * shape.heads,),
        integers=(shape.tokens,),
        outputs=outputs,
        constants=(
            ("N", shape.heads),
            ("H", shape.head_dim),
            ("EPSILON", shape.epsilon),
            ("ROWS", rows),
            ("BLOCK", block_of(shape)),
            *constants,
        ),
        num_warps=NUM_WARPS,
        num_stages=1,
    )
