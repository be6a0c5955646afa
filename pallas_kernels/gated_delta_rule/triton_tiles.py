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
    """What a token keeps of what each token up to it wrote, [L, L]: nothing across the start of a document."""
    sums, begun = _running(log_decay, starts, row, chunk, tokens, n, N, L, SEGMENTED)
    i = tl.arange(0, L)
    seen = (i[:, None] >= i[None, :]) & (begun[:, None] == begun[None, :])
    return tl.where(seen, tl.exp((sums[:, None] - sums[None, :]).to(tl.float32)), 0.0)


@triton.jit
def decays_of_ends(log_decay, starts, row, chunk, tokens, n, N: tl.constexpr, L: tl.constexpr, SEGMENTED: tl.constexpr):
    """What each token keeps of the state before the chunk, and the last one of what each wrote, [L] both."""
    sums, begun = _running(log_decay, starts, row, chunk, tokens, n, N, L, SEGMENTED)
    last = tl.sum(tl.where(tl.arange(0, L) == L - 1, sums, 0.0), 0)
    from_start = tl.where(begun == 0, tl.exp(sums.to(tl.float32)), 0.0)
    return from_start, tl.where(begun == tl.max(begun, 0), tl.exp((last - sums).to(tl.float32)), 0.0)


@triton.jit
def _running(log_decay, starts, row, chunk, tokens, n, N: tl.constexpr, L: tl.constexpr, SEGMENTED: tl.constexpr):
    """Sums of log decays, and how many documents have begun, from the start of a chunk up to each token, [L] both.

    Sums are float64: in float32 their differences lose the digits of small decays that follow large ones.
    """
    sums = tl.cumsum(load_numbers(log_decay, row, chunk, tokens, n, N, L).to(tl.float64), 0)
    token = chunk * L + tl.arange(0, L)
    begun = tl.zeros([L], tl.int32)
    if SEGMENTED:
        begun = tl.cumsum(tl.load(starts + row * tokens + token, mask=token < tokens, other=0), 0)
    return sums, begun
