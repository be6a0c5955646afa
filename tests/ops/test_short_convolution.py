"""The short convolution against a loop over tokens: documents, padding, rows cut anywhere, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rat_jax.ops.short_convolution import short_convolution
from rat_jax.segments import StreamState, from_segments, whole_rows

SEGMENTS = np.array([[1] * 3 + [2] * 5 + [0] * 2 + [1] * 3, [0] * 4 + [7] * 1 + [8] * 7 + [0] * 1])
DRAW = np.random.default_rng(0)
X, KERNEL = (DRAW.normal(size=size).astype(np.float32) for size in ((2, 13, 3), (4, 3)))


def loop(x, kernel, segment_ids):
    """Each token by itself; padding is 0."""
    out = np.zeros(x.shape)
    for row, t in zip(*np.nonzero(segment_ids), strict=True):
        for i in range(len(kernel)):
            if i > t or segment_ids[row, t - i] != segment_ids[row, t]:
                break
            out[row, t] += np.float64(kernel[-1 - i]) * x[row, t - i]
    return out


@jax.jit
def go_on(x, segment_ids, end, last_inputs, kernel=KERNEL):
    segments, end = from_segments(segment_ids, end)
    return short_convolution(x, jnp.asarray(kernel), segments, last_inputs), end


@pytest.mark.parametrize("size", [1, 2, 4])
def test_whole_rows(size):
    out, last_inputs = short_convolution(jnp.asarray(X), jnp.asarray(KERNEL[:size]), whole_rows(2, 13))
    np.testing.assert_allclose(out, loop(X, KERNEL[:size], np.ones((2, 13))), atol=1e-6)
    assert last_inputs is None


def test_documents_and_padding():
    segments = from_segments(jnp.asarray(SEGMENTS))[0]
    out = short_convolution(jnp.asarray(X), jnp.asarray(KERNEL), segments).out
    is_token = SEGMENTS != 0
    np.testing.assert_allclose(out[is_token], loop(X, KERNEL, SEGMENTS)[is_token], atol=1e-6)


def test_rows_cut_at_every_offset():
    """Each part has other padding too: the first at its end, the second at its start."""
    want, is_token = loop(X, KERNEL, SEGMENTS), SEGMENTS != 0
    for cut in range(14):
        end, last_inputs, outs = StreamState.empty(2), np.zeros((2, 3, 3), np.float32), []
        for first, last, padding in ((0, cut, (0, 13 - cut)), (cut, 13, (cut, 0))):
            x = np.pad(X[:, first:last], [(0, 0), padding, (0, 0)], constant_values=100)
            ids = np.pad(SEGMENTS[:, first:last], [(0, 0), padding])
            (out, last_inputs), end = go_on(x, ids, end, last_inputs)
            outs.append(np.asarray(out)[:, padding[0] : 13 - padding[1]])
        np.testing.assert_allclose(np.concatenate(outs, axis=1)[is_token], want[is_token], atol=1e-6)
    np.testing.assert_array_equal(last_inputs, [X[0, 10:13], X[1, 9:12]])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_single_tokens_are_exactly_those_of_whole_rows(size):
    """Of whole numbers, whose sums are exact in any order; what padding holds is kept by no row."""
    x, kernel = (np.round(16 * array) for array in (X, KERNEL[-size:]))
    end, last_inputs, kept = StreamState.empty(2), np.zeros((2, size - 1, 3), np.float32), [[np.zeros(3)] * 4] * 2
    want = loop(x, kernel, SEGMENTS)
    for t in range(13):
        is_token = SEGMENTS[:, t] != 0
        token = np.where(is_token[:, None], x[:, t], 100)[:, None]
        (out, last_inputs), end = go_on(token, SEGMENTS[:, t : t + 1], end, last_inputs, kernel)
        np.testing.assert_array_equal(out[is_token, 0], want[is_token, t])
        kept = [tokens + [x[row, t]] * int(is_token[row]) for row, tokens in enumerate(kept)]
        latest = [tokens[len(tokens) - size + 1 :] for tokens in kept]
        np.testing.assert_array_equal(last_inputs, np.reshape(latest, last_inputs.shape))


@pytest.mark.usefixtures("annotations_unchecked")
def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"kernel must be \[taps, 3\] for x of \(2, 13, 3\), got \(4, 2\)"):
        short_convolution(X, KERNEL[:, :2], whole_rows(2, 13))
    with pytest.raises(ValueError, match=r"last_inputs must be \(2, 3, 3\), got \(2, 4, 3\)"):
        short_convolution(X, KERNEL, whole_rows(2, 13), X[:, :4])
