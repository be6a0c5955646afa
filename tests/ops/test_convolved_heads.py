"""Convolved heads: values and gradients by any implementation, earlier inputs, meshes, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rat_jax.ops import UnsupportedError, convolved_heads, dispatch, platform
from rat_jax.ops.remat import saving_named
from rat_jax.segments import StreamState, from_segments, whole_rows
from tests import reference, virtual_devices
from tests.jax_triton import require_jax_triton

PACKED = np.array([[4] * 5 + [2] * 9 + [0] * 2 + [7] * 24, [0] * 3 + [1] * 37])
WHOLE = np.ones((2, 40), int)
SIZES = {"num_heads": 3, "key_dim": 4}
RESULTS = ("query", "key", "value")


def arrays(tokens=40, taps=4, heads=3, key_dim=4, value_dim=6, dtype=jnp.float32):
    """Projected tokens and the taps."""
    draw, channels = np.random.default_rng(tokens), heads * (2 * key_dim + value_dim)
    projected = jnp.asarray(draw.standard_normal((2, tokens, channels)), dtype)
    return projected, jnp.asarray(draw.standard_normal((taps, channels)), jnp.float32)


def expected(projected, taps, segment_ids, num_heads=3, key_dim=4):
    """In float64, token by token; padding is left out, as not a number."""
    x, taps = np.asarray(projected, np.float64), np.asarray(taps, np.float64)
    out = np.full(x.shape, np.nan)
    for row, t in zip(*np.nonzero(segment_ids), strict=True):
        out[row, t] = taps[-1] * x[row, t]
        for i in range(1, len(taps)):
            if i > t or segment_ids[row, t - i] != segment_ids[row, t]:
                break
            out[row, t] += taps[-1 - i] * x[row, t - i]
    parts = np.split(out * reference.sigmoid(out), [num_heads * key_dim, 2 * num_heads * key_dim], axis=-1)
    query, key, value = (part.reshape(*x.shape[:2], num_heads, -1) for part in parts)
    query, key = (x / np.sqrt(np.sum(x * x, -1, keepdims=True) + 1e-6) for x in (query, key))
    return query / np.sqrt(key_dim), key, value


def both_passes(implementation, ids, d_results, projected, taps, **sizes):
    """Results, and gradients of both arrays from those of tokens' results."""
    is_token = 1 if ids is None else (ids != 0)[..., None, None]

    def run(projected, taps):
        return convolved_heads(projected, taps, ids, **(SIZES | sizes), implementation=implementation)[:3]

    results, pull_back = jax.vjp(run, projected, taps)
    return *results, *pull_back(tuple((d * is_token).astype(x.dtype) for d, x in zip(d_results, results, strict=True)))


IMPLEMENTATIONS = ["xla", pytest.param("triton", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("segments", "taps"), [(WHOLE, 4), (PACKED, 4), (PACKED, 1)], ids=["whole", "packed", "one"])
def test_values_are_those_of_float64(implementation, segments, taps):
    projected, kernel = arrays(taps=taps)
    ids = None if segments is WHOLE else jnp.asarray(segments)
    found = jax.jit(lambda *x: convolved_heads(*x, ids, **SIZES, implementation=implementation))(projected, kernel)
    assert found.last_inputs is None
    is_token = segments != 0
    for x, wanted in zip(found[:3], expected(projected, kernel, segments), strict=True):
        np.testing.assert_allclose(np.asarray(x)[is_token], wanted[is_token], atol=2e-6)
        assert np.isfinite(x).all()


@pytest.mark.parametrize("segments", [WHOLE, PACKED], ids=["whole", "packed"])
def test_gradients_are_those_of_differences(segments):
    """Of a weighted sum of float64 results, along a direction of each array."""
    projected, kernel = arrays()
    ids, draw = None if segments is WHOLE else jnp.asarray(segments), np.random.default_rng(0)
    is_token = (segments != 0)[..., None, None]
    weights = [draw.standard_normal(x.shape) for x in expected(projected, kernel, segments)]

    def total(projected, kernel):
        results = expected(projected, kernel, segments)
        return sum(np.sum(np.where(is_token, x, 0) * w) for x, w in zip(results, weights, strict=True))

    found = jax.jit(lambda *x: both_passes("xla", ids, weights, *x))(projected, kernel)[3:]
    exact = [np.asarray(x, np.float64) for x in (projected, kernel)]
    for i, gradient in enumerate(found):
        step = 1e-5 * draw.standard_normal(gradient.shape)
        ahead, behind = ([*exact[:i], exact[i] + sign * step, *exact[i + 1 :]] for sign in (1, -1))
        slope = (total(*ahead) - total(*behind)) / 2
        assert abs(np.sum(np.asarray(gradient, np.float64) * step) - slope) < 1e-5 * np.linalg.norm(
            step
        ) * np.linalg.norm(gradient)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [(1, (3, 4, 6)), (40, (2, 128, 128)), (1000, (16, 128, 128)), (700, (6, 256, 512)), (300, (5, 48, 96))],
)
def test_kernels_err_at_most_twice_as_much_as_plain_xla(tokens, sizes, dtype):
    """Measured from plain XLA in float32."""
    heads, key_dim, value_dim = sizes
    projected, taps = arrays(tokens, heads=heads, key_dim=key_dim, value_dim=value_dim, dtype=dtype)
    ids = jnp.asarray(PACKED) if tokens == 40 else None
    options = {"num_heads": heads, "key_dim": key_dim}
    keys = jax.random.split(jax.random.key(0), 3)
    widths = (key_dim, key_dim, value_dim)
    weights = [jax.random.normal(key, (2, tokens, heads, n), dtype) for key, n in zip(keys, widths, strict=True)]

    def run(name, projected):
        return jax.jit(lambda *x: both_passes(name, ids, weights, *x, **options))(projected, taps)

    exact = run("xla", projected.astype(jnp.float32))
    found, plain = run("triton", projected), run("xla", projected)
    for a, b, truth in zip(found, plain, exact, strict=True):
        assert a.dtype == b.dtype
        truth = np.asarray(truth, np.float64)
        error, budget = (np.linalg.norm(np.asarray(x, np.float64) - truth) for x in (a, b))
        assert error <= 2 * budget + 2e-6 * np.linalg.norm(truth)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "plain_kernel"])
@pytest.mark.parametrize(("parts", "taps"), [([2, 7, 1, 1, 29], 4), ([20, 20], 1), ([1] * 40, 2)])
def test_earlier_inputs_go_on(parts, taps, implementation, monkeypatch):
    """With plain XLA in the kernel's place, too, around which its rows continue."""
    if implementation == "plain_kernel":
        implementation = "triton"
        monkeypatch.setattr(dispatch, "choose", lambda *arguments: "triton")
        monkeypatch.setattr(dispatch, "run", lambda kernel, fall_back, *arguments: kernel.plain(*arguments))
    projected, kernel = arrays(taps=taps)

    @jax.jit
    def go_on(projected, ids, end, last_inputs):
        segments, end = from_segments(ids, end)
        options = SIZES | {"last_inputs": last_inputs, "implementation": implementation}
        return convolved_heads(projected, kernel, segments, **options), end

    last_inputs, end, found, start = jnp.zeros((2, taps - 1, 42)), StreamState.empty(2), [], 0
    for size in parts:
        part = slice(start, start + size)
        padding = (2, 1) if len(found) % 2 else (0, 0)
        x = jnp.pad(projected[:, part], [(0, 0), padding, (0, 0)], constant_values=100)
        heads, end = go_on(x, jnp.pad(PACKED[:, part], [(0, 0), padding]), end, last_inputs)
        found.append([x[:, padding[0] : padding[0] + size] for x in heads[:3]])
        last_inputs, start = heads.last_inputs, start + size
    np.testing.assert_array_equal(last_inputs, projected[:, 41 - taps :])
    is_token = PACKED != 0
    for xs, wanted in zip(zip(*found, strict=True), expected(projected, kernel, PACKED), strict=True):
        np.testing.assert_allclose(np.concatenate(xs, axis=1)[is_token], wanted[is_token], atol=2e-6)


def test_results_have_the_dtype_of_the_projection():
    projected, taps = arrays(dtype=jnp.bfloat16)
    found = convolved_heads(projected, taps, **SIZES)
    exact = convolved_heads(projected.astype(jnp.float32), taps, **SIZES)
    for x, truth in zip(found[:3], exact[:3], strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_array_equal(x, truth.astype(jnp.bfloat16))  # rounded once


@pytest.fixture(scope="module")
def on_meshes():
    """What a process of its own, which sees four CPU devices, computed on one of them and on each mesh."""
    return virtual_devices.run("tests.ops.sharded_heads")


@pytest.mark.parametrize("mesh", ["tokens", "heads"])
def test_parts_on_devices_are_what_one_device_gives(on_meshes, mesh):
    """Values and gradients of packed rows; parts of two tokens reach over two of their neighbours."""
    for a, b in zip(on_meshes[mesh], on_meshes["whole"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_kernels_are_traced_for_a_gpu_but_of_one_token(monkeypatch):
    require_jax_triton()
    monkeypatch.setattr(platform, "expected_platform", lambda: "gpu")
    for implementation, tokens, is_kernel in (
        ("triton", 40, True),
        (None, 40, True),
        (None, 1, False),
        ("xla", 40, False),
    ):

        def loss(projected, taps, implementation=implementation):
            return convolved_heads(projected, taps, **SIZES, implementation=implementation).query.sum()

        text = str(jax.jit(jax.grad(loss)).trace(*arrays(tokens)).jaxpr)
        assert all((f"convolved_heads_{name}" in text) == is_kernel for name in ("forward", "backward"))


def test_policies_that_save_kernel_results_compute_these_again(monkeypatch):
    require_jax_triton()
    monkeypatch.setattr(platform, "expected_platform", lambda: "gpu")
    policy = saving_named(jax.checkpoint_policies.nothing_saveable)

    def loss(projected, taps):
        heads = convolved_heads(projected, taps, **SIZES, implementation="triton")
        return sum(jnp.sum(jnp.sin(x)) for x in heads[:3])

    text = str(jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(*arrays()))
    assert text.count("name=convolved_heads_forward") == 2 * text.count("name=convolved_heads_backward") > 0


@pytest.mark.usefixtures("annotations_unchecked")
def test_what_does_not_fit_is_refused():
    projected, taps = arrays()
    for call, error, message in (
        (lambda: convolved_heads(projected[0], taps, **SIZES), ValueError, r"projected must be \[B, T, c\] and taps"),
        (lambda: convolved_heads(projected, taps[:, 1:], **SIZES), ValueError, r"got \(2, 40, 42\) and \(4, 41\)"),
        (lambda: convolved_heads(projected, taps[:0], **SIZES), ValueError, "taps must be a whole number of 1 or more"),
        (lambda: convolved_heads(projected[:, :0], taps, **SIZES), ValueError, "tokens must be a whole number of 1"),
        (lambda: convolved_heads(projected.astype(int), taps, **SIZES), ValueError, "must be of floating numbers"),
        (
            lambda: convolved_heads(projected, taps, num_heads=4, key_dim=4),
            ValueError,
            "a multiple of 4 above 32, got 42",
        ),
        (
            lambda: convolved_heads(projected, taps, num_heads=3, key_dim=7),
            ValueError,
            "a multiple of 3 above 42, got 42",
        ),
        (
            lambda: convolved_heads(projected, taps, **SIZES, last_inputs=jnp.zeros((2, 3, 42))),
            ValueError,
            "a state holds no positions",
        ),
        (
            lambda: convolved_heads(projected, taps, whole_rows(2, 40), **SIZES, last_inputs=jnp.zeros((2, 2, 42))),
            ValueError,
            r"last_inputs must be \(2, 3, 42\), got \(2, 2, 42\)",
        ),
        (
            lambda: convolved_heads(projected, taps, WHOLE[:, 1:], **SIZES),
            ValueError,
            r"shape \(2, 40\), got \(2, 39\)",
        ),
        (
            lambda: convolved_heads(projected, taps, **SIZES, implementation="triton"),
            UnsupportedError,
            "it runs on NVIDIA GPUs",
        ),
        (
            lambda: convolved_heads(projected, taps, **SIZES, implementation="cudnn"),
            UnsupportedError,
            "must be one of xla, triton",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
