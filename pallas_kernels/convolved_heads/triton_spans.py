"""Where a program's tokens and channels lie, and the convolution of one token, for both passes."""

import triton
import triton.language as tl


@triton.jit
def channels_of(block, WIDTH: tl.constexpr, HEAD: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr):
    """Channels of a block of HEADS heads, [HEADS, COLUMNS], and which of them there are."""
    head, column = block * HEADS + tl.arange(0, HEADS), tl.arange(0, COLUMNS)
    channel = head[:, None] * HEAD + column[None, :]
    return channel, (column < HEAD)[None, :] & (channel < WIDTH)


@triton.jit
def load(array, row, token, tokens, WIDTH: tl.constexpr, channel, inside):
    """Channels of a token of [B, T, WIDTH]; 0 before the row and after it."""
    use = inside & (token >= 0) & (token < tokens)
    return tl.load(array + (row * tokens + token) * WIDTH + channel, mask=use, other=0.0)


@triton.jit
def position_of(positions, row, token, tokens, SEGMENTED: tl.constexpr):
    """A token's place in its document; after the row 0. Without documents any place that sees all tokens will do."""
    if SEGMENTED:
        return tl.load(positions + row * tokens + token, mask=token < tokens, other=0)
    return tl.zeros([], tl.int32)


@triton.jit
def load_taps(taps, WIDTH: tl.constexpr, TAPS: tl.constexpr, channel, inside):
    """Rows of [TAPS, WIDTH] from the last one back: of the token itself, of the one before it and so on."""
    found = ()
    for i in tl.static_range(TAPS):
        found = found + (tl.load(taps + (TAPS - 1 - i) * WIDTH + channel, mask=inside, other=0.0),)  # noqa: RUF005
    return found


@triton.jit
def convolve(x, earlier, taps, position, TAPS: tl.constexpr, SEGMENTED: tl.constexpr):
    """A token's convolution, of it and those before it, the latest first."""
    convolved = x * taps[0]
    for i in tl.static_range(1, TAPS):
        seen = earlier[i - 1]
        if SEGMENTED:
            seen = tl.where(position >= i, seen, 0.0)
        convolved += seen * taps[i]
    return convolved


@triton.jit
def silus(x):
    """silu of x, and its slope."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))  # one instruction, of which a reciprocal takes five
    sigmoid = root * root
    silu = x * sigmoid
    return silu, sigmoid + silu * (1.0 - sigmoid)
