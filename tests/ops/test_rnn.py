"""The RNN mixing op: its values and gradients by any implementation, states, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rat_jax.ops import UnsupportedError, platform, rnn_mix
from rat_jax.segments import StreamState, from_segments, whole_rows
from tests import reference
from tests.jax_triton import require_jax_triton

PACKED = np.array([[4] * 5 + [2] * 9 + [0] * 2 + [7] * 24, [0] * 3 + [1] * 37])


def arrays(tokens, width=16, dtype=jnp.float32):
    """Projected tokens and the bias of the gate."""
    projected = np.random.default_rng(tokens).normal(size=(2, tokens, 3 * width)).astype(np.float32)
    return jnp.asarray(projected, dtype), jnp.linspace(-2.0, 6.0, width)


def expected(projected, gate_bias, segments):
    """In float64, document by document; padding is left out."""
    z, value, gate = np.split(np.asarray(projected, np.float64), 3, axis=-1)
    out = np.full(z.shape, np.nan)
    for row, ids in enumerate(segments):
        for number in set(ids) - {0}:
            mine = np.flatnonzero(ids == number)
            gates = (gate[row, mine] + np.asarray(gate_bias, np.float64))[None]
            states = reference.gated_recurrence(gates, value[row, mine][None])[0]
            out[row, mine] = reference.sigmoid(z[row, mine]) * states
    return out


IMPLEMENTATIONS = ["xla", pytest.param("triton", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("segments", [np.ones((2, 40), int), PACKED], ids=["whole", "packed"])
def test_values_are_those_of_float64(implementation, segments):
    projected, gate_bias = arrays(40)
    ids = None if (segments == 1).all() else jnp.asarray(segments)
    mixed = jax.jit(lambda *x: rnn_mix(*x, ids, implementation=implementation).out)(projected, gate_bias)
    wanted = expected(projected, gate_bias, segments)
    is_token = segments != 0
    np.testing.assert_allclose(np.asarray(mixed)[is_token], wanted[is_token], atol=2e-6)
    assert np.isfinite(mixed).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tokens", [1, 40, 1000, 5000])
def test_gradients_on_the_gpu_are_those_of_plain_xla(tokens, dtype):
    projected, gate_bias = arrays(tokens, 200, dtype)
    ids = None if tokens != 40 else jnp.asarray(PACKED)
    d_out = jax.random.normal(jax.random.key(0), (2, tokens, 200), dtype)

    def gradients(implementation):
        out, pull = jax.vjp(lambda *x: rnn_mix(*x, ids, implementation=implementation).out, projected, gate_bias)
        return out, *pull(d_out)

    found, wanted = (jax.jit(lambda name=name: gradients(name))() for name in ("triton", "xla"))
    for a, b in zip(found, wanted, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= (2e-6 if dtype == jnp.float32 else 1e-2) * np.linalg.norm(b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("parts", [[40], [7, 1, 1, 30, 1]])
def test_a_state_goes_on(implementation, parts):
    projected, gate_bias = arrays(40)
    state, end, out, start = jnp.zeros((2, 16)), StreamState.empty(2), [], 0
    for size in parts:
        part = slice(start, start + size)
        layout, end = from_segments(jnp.asarray(PACKED[:, part]), end)
        mixed = rnn_mix(projected[:, part], gate_bias, layout, state=state, implementation=implementation)
        out.append(mixed.out)
        state, start = mixed.state, start + size
    is_token = PACKED != 0
    found, wanted = np.concatenate(out, axis=1), expected(projected, gate_bias, PACKED)
    np.testing.assert_allclose(found[is_token], wanted[is_token], atol=2e-6)


def test_the_kernels_are_traced_for_a_gpu_but_of_one_token(monkeypatch):
    require_jax_triton()
    monkeypatch.setattr(platform, "expected_platform", lambda: "gpu")
    monkeypatch.setattr(platform, "expected_capability", lambda: (9, 0))
    for implementation, tokens, is_kernel in (
        ("triton", 40, True),
        (None, 40, True),
        (None, 1, False),
        ("xla", 40, False),
    ):

        def loss(projected, gate_bias, implementation=implementation):
            return rnn_mix(projected, gate_bias, implementation=implementation).out.sum()

        text = str(jax.jit(jax.grad(loss)).trace(*arrays(tokens)).jaxpr)
        assert all((name in text) == is_kernel for name in ("rnn_forward", "rnn_backward"))


@pytest.mark.usefixtures("annotations_unchecked")
def test_what_does_not_fit_is_refused():
    projected, gate_bias = arrays(8)
    for call, error, message in (
        (lambda: rnn_mix(projected[0], gate_bias), ValueError, r"projected must be \[B, T, 3 D\]"),
        (lambda: rnn_mix(projected[..., :-1], gate_bias), ValueError, "must have 3 D = 48 channels, got 47"),
        (lambda: rnn_mix(projected[:, :0], gate_bias), ValueError, "tokens must be a whole number of 1 or more"),
        (lambda: rnn_mix(projected.astype(int), gate_bias), ValueError, "projected must be of floating numbers"),
        (lambda: rnn_mix(projected, gate_bias, state=jnp.zeros((2, 16))), ValueError, "a state holds no positions"),
        (
            lambda: rnn_mix(projected, gate_bias, whole_rows(2, 8), state=jnp.zeros((2, 15))),
            ValueError,
            r"state must be \(2, 16\), got \(2, 15\)",
        ),
        (lambda: rnn_mix(projected, gate_bias, implementation="triton"), UnsupportedError, "it runs on NVIDIA GPUs"),
        (lambda: rnn_mix(projected, gate_bias, implementation="cudnn"), UnsupportedError, "must be one of xla, triton"),
    ):
        with pytest.raises(error, match=message):
            call()
