"""phi(x) = [m(x), m(-x)] inside a kernel, half by half, and back: m is the softmax over a head or the positive part."""

import triton
import triton.language as tl


@triton.jit
def half_features(x, H: tl.constexpr, P: tl.constexpr, SOFTMAX: tl.constexpr):
    """m(x) in float32 of x [rows, P] float32, where channels from H on are none."""
    if SOFTMAX:
        if H != P:
            x = tl.where((tl.arange(0, P) < H)[None, :], x, -float("inf"))
        weights = tl.exp2(x * 1.4426950408889634 - (tl.max(x, axis=1) * 1.4426950408889634)[:, None])
        return weights * (1.0 / tl.sum(weights, axis=1))[:, None]
    return tl.maximum(x, 0.0)


@triton.jit
def pull_back(f, d_f, SOFTMAX: tl.constexpr):
    """The gradient of x from f = m(x) and the gradient of f, all float32."""
    if SOFTMAX:
        return f * (d_f - tl.sum(f * d_f, axis=1)[:, None])
    return tl.where(f > 0, d_f, 0.0)


@triton.jit
def load_rows(
    base, first, rows, n, column, N: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr = 1
):
    """WIDTH channels from `column` on of the tokens from `first` on of an array [..., N, H], HEADS rows a token.

    Row i is head n + i % HEADS of token i // HEADS, and 0 if it is not taken.
    """
    at, mask = _rows(rows, n, column, N, H, WIDTH, HEADS)
    return tl.load(base + first * (N * H) + at, mask=mask, other=0.0)


@triton.jit
def store_rows(
    base, first, rows, n, column, x, N: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr = 1
):
    at, mask = _rows(rows, n, column, N, H, WIDTH, HEADS)
    tl.store(base + first * (N * H) + at, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _rows(rows, n, column, N: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr):
    channel = column + tl.arange(0, WIDTH)
    mask = rows[:, None] & (channel < H)[None, :]
    i = tl.arange(0, rows.shape[0])
    return (i // HEADS * (N * H) + (n + i % HEADS) * H)[:, None] + channel[None, :], mask


@triton.jit
def tokens_of(block, BLOCK: tl.constexpr, HEADS: tl.constexpr = 1):
    """The token of each row of a block, HEADS rows a token."""
    return block * BLOCK + tl.arange(0, BLOCK * HEADS) // HEADS


@triton.jit
def load_state(base, half, column, P: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS channels of one half [P, COLUMNS] of a padded state [2, P, P]."""
    feature = half * P + tl.arange(0, P)
    return tl.load(base + feature[:, None] * P + column + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def load_initial(base, half, column, H: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS channels of one half [P, COLUMNS] of an initial state [2 H, H]."""
    feature = tl.arange(0, P)
    channel = column + tl.arange(0, COLUMNS)
    mask = (feature < H)[:, None] & (channel < H)[None, :]
    return tl.load(base + (half * H + feature)[:, None] * H + channel[None, :], mask=mask, other=0.0)
