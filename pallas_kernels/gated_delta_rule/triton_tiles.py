"""Tiles of the gated delta rule's arrays, and the decays of a chunk, as its Triton kernels read them.

Arrays of tokens are [B, T, N, H] or [B, T, N]; those of chunks [B, N, C, ...], whose first index is
(row N + n) C + chunk, or `at_chunk`.
"""

import triton
import triton.language as tl


@triton.jit
def load_tokens(
    array, row, chunk, tokens, n, column, N: tl.constexpr, H: tl.constexpr, L: tl.constexpr, W: tl.constexpr
):
    """Channels column .. column + W - 1 of a head of a chunk's tokens, [L, W]; 0 outside of the array."""
    at, inside = _tokens(row, chunk, tokens, n, column, N, H, L, W)
    return tl.load(array + at, mask=inside, other=0.0)


@triton.jit
def store_tokens(
    array, x, row, chunk, tokens, n, column, N: tl.constexpr, H: tl.constexpr, L: tl.constexpr, W: tl.constexpr
):
    at, inside = _tokens(row, chunk, tokens, n, column, N, H, L, W)
    tl.store(array + at, x.to(array.dtype.element_ty), mask=inside)


@triton.jit
def _tokens(row, chunk, tokens, n, column, N: tl.constexpr, H: tl.constexpr, L: tl.constexpr, W: tl.constexpr):
    i, channel = tl.arange(0, L), column + tl.arange(0, W)
    first = (row * tokens + chunk * L) * (N * H) + n * H
    return first + (i[:, None] * (N * H) + channel[None, :]), (chunk * L + i < tokens)[:, None] & (channel < H)[None, :]


@triton.jit
def load_numbers(array, row, chunk, tokens, n, N: tl.constexpr, L: tl.constexpr):
    """One number a token of a head, [L]; 0 after the row."""
    token = chunk * L + tl.arange(0, L)
    return tl.load(array + (row * tokens + token) * N + n, mask=token < tokens, other=0.0)


@triton.jit
def load_state(array, at_chunk, column, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, W: tl.constexpr, key=0):
    """Columns of a state [HK, HV], from its row `key` on, [K, W]; 0 outside of it."""
    at, inside = _state(at_chunk, key, column, HK, HV, K, W)
    return tl.load(array + at, mask=inside, other=0.0)


@triton.jit
def store_state(array, x, at_chunk, column, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, W: tl.constexpr):
    at, inside = _state(at_chunk, 0, column, HK, HV, K, W)
    tl.store(array + at, x.to(array.dtype.element_ty), mask=inside)


@triton.jit
def _state(at_chunk, key, column, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, W: tl.constexpr):
    k, channel = key + tl.arange(0, K), column + tl.arange(0, W)
    return at_chunk * (HK * HV) + (k[:, None] * HV + channel[None, :]), (k < HK)[:, None] & (channel < HV)[None, :]


@triton.jit
def square(at_chunk, L: tl.constexpr):
    """Where the numbers of a chunk's pairs of tokens lie in [B, N, C, L, L]."""
    i = tl.arange(0, L)
    return at_chunk * (L * L) + (i[:, None] * L + i[None, :])


@triton.jit
def decays(log_decay, starts, row, chunk, tokens, n, N: tl.constexpr, L: tl.constexpr, SEGMENTED: tl.constexpr):
    """What a token keeps of what each token up to it wrote, [L, L]: nothing across the start of a document.

    Each is exp of its own sum of log decays: differences of running sums would lose the digits of small decays that
    follow large ones.
    """
    i = tl.arange(0, L)
    up_to = i[:, None] >= i[None, :]
    g = load_numbers(log_decay, row, chunk, tokens, n, N, L)
    sums = tl.cumsum(tl.where(up_to & (i[:, None] != i[None, :]), g[:, None], 0.0), 0)
    if SEGMENTED:
        begun = documents(starts, row, chunk, tokens, L)
        up_to = up_to & (begun[:, None] == begun[None, :])
    return tl.where(up_to, tl.exp(sums), 0.0)


@triton.jit
def decays_to_ends(log_decay, starts, row, chunk, tokens, n, N: tl.constexpr, L: tl.constexpr, SEGMENTED: tl.constexpr):
    """What each token keeps of the state before the chunk, and the last one of what each wrote, [L] both."""
    i = tl.arange(0, L)
    from_start = tl.exp(tl.cumsum(load_numbers(log_decay, row, chunk, tokens, n, N, L), 0))
    after = chunk * L + i + 1
    at = (row * tokens + after) * N + n
    to_end = tl.exp(tl.cumsum(tl.load(log_decay + at, mask=(after < tokens) & (i + 1 < L), other=0.0), 0, reverse=True))
    if SEGMENTED:
        begun = documents(starts, row, chunk, tokens, L)
        from_start = tl.where(begun == 0, from_start, 0.0)
        to_end = tl.where(begun == tl.max(begun, 0), to_end, 0.0)
    return from_start, to_end


@triton.jit
def documents(starts, row, chunk, tokens, L: tl.constexpr):
    """How many documents have begun in a chunk up to each token, [L]."""
    token = chunk * L + tl.arange(0, L)
    return tl.cumsum(tl.load(starts + row * tokens + token, mask=token < tokens, other=0), 0)
