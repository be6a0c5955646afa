"""The choice among implementations, the derivative around them, and what is said of calls that none takes."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rat_jax.errors import RatJaxError
from rat_jax.ops import UnsupportedError, dispatch, platform
from rat_jax.ops.rat import RatImplementation
from rat_jax.ops.remat import saving_named


def trace_for(monkeypatch, name, capability=None, devices=1):
    monkeypatch.setattr(platform, "expected_platform", lambda: name)
    monkeypatch.setattr(platform, "expected_capability", lambda: capability)
    monkeypatch.setattr(dispatch, "num_parts", lambda *axes: devices)


def taken(name):
    return None


ALL = ("mosaic_gpu", "triton", "pallas_tpu")


@pytest.mark.parametrize(
    ("expected", "capability", "chosen"),
    [
        ("cpu", None, "xla"),
        ("tpu", None, "pallas_tpu"),
        ("gpu", (9, 0), "mosaic_gpu"),
        ("cuda", (9, 0), "mosaic_gpu"),
        ("gpu", None, "triton"),  # a card that is not known may be none of Hopper's
        ("rocm", None, "xla"),
    ],
)
def test_what_is_worth_tracing_follows_the_platform(expected, capability, chosen, monkeypatch):
    trace_for(monkeypatch, expected, capability)
    assert dispatch.choose(None, ALL, 4, taken) == chosen


def test_the_first_that_takes_the_call_is_chosen(monkeypatch):
    trace_for(monkeypatch, "gpu", (9, 0))
    assert dispatch.choose(None, ALL, 4, {"mosaic_gpu": "no", "triton": None}.get) == "triton"
    assert dispatch.choose(None, ALL, 4, lambda name: "no") == "xla"
    assert dispatch.choose("xla", ALL, 4, lambda name: "no") == "xla"


def test_a_named_implementation_runs_or_says_why_not(monkeypatch):
    trace_for(monkeypatch, "cpu")
    with pytest.raises(UnsupportedError, match="'triton' cannot run this call: it runs on NVIDIA GPUs"):
        dispatch.choose("triton", ALL, 4, taken)
    trace_for(monkeypatch, "gpu")
    with pytest.raises(UnsupportedError, match="it runs on TPUs, and this program is traced for the gpu"):
        dispatch.choose("pallas_tpu", ALL, 4, taken)
    assert dispatch.choose("triton", ALL, 4, taken) == "triton"
    with pytest.raises(UnsupportedError, match="implementation 'triton' cannot run this call: it is too long"):
        dispatch.choose("triton", ALL, 4, lambda name: "it is too long")
    with pytest.raises(UnsupportedError, match=r"implementation must be one of xla, triton, .*, got 'cuda'"):
        dispatch.check_implementation("cuda", RatImplementation)
    assert issubclass(UnsupportedError, ValueError)
    assert issubclass(UnsupportedError, RatJaxError)


def test_batch_rows_that_do_not_divide_among_devices(monkeypatch):
    trace_for(monkeypatch, "tpu", devices=4)
    assert dispatch.choose(None, ALL, 8, taken) == "pallas_tpu"
    assert dispatch.choose(None, ALL, 6, taken) == "xla"
    with pytest.raises(UnsupportedError, match="6 batch rows do not divide among the 4 devices that the mesh"):
        dispatch.choose("pallas_tpu", ALL, 6, taken)
    assert [dispatch.rows_of_device(batch) for batch in (8, 6, 1)] == [2, 1, 1]


@dataclasses.dataclass(frozen=True)
class Scaled(dispatch.Kernel):
    """x w and the sum of its rows; as a kernel 10 times as much, so that the results show what ran."""

    implementation: str
    replicated: ClassVar[tuple[int, ...]] = (1,)
    num_differentiated: ClassVar[int] = 2
    saved_results: ClassVar[tuple[int, ...]] = (0,)
    without_gradient: ClassVar[tuple[int, ...]] = (1,)

    def forward(self, x, w, ids):
        out, total = self.plain(x, w, ids)
        return (10 * out, 10 * total), x.sum()[None]

    def plain(self, x, w, ids):
        return x * w, (x * w).sum(axis=1)

    def backward(self, arguments, saved, residuals, d_results):
        (x, w, _), (out,), (d_out, d_total) = arguments, saved, d_results
        assert d_total is None
        assert out.shape == x.shape
        assert residuals.shape == (1,)
        return 10 * d_out * w, (10 * d_out * x).sum(axis=0, keepdims=True)


X, W, IDS = jnp.arange(6.0).reshape(2, 3), jnp.array([[1.0, 2.0, 3.0]]), jnp.array([1, 1])


def gradients(fall_back, results, implementation="pallas_tpu"):
    def loss(x, w):
        return sum(jnp.sum(y) for y in results(dispatch.run(Scaled(implementation), fall_back, x, w, IDS)))

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(X, W)


def first(results):
    return results[:1]


def both(results):
    return results


def test_the_kernel_gives_results_and_gradients():
    loss, (d_x, d_w) = gradients(False, first)
    assert loss == 10 * jnp.sum(X * W)
    np.testing.assert_array_equal(d_x, 10 * jnp.broadcast_to(W, X.shape))
    np.testing.assert_array_equal(d_w, 10 * X.sum(axis=0, keepdims=True))


def test_lowered_for_another_platform_plain_xla_runs_in_both_directions():
    loss, (d_x, d_w) = gradients(True, first)
    assert loss == jnp.sum(X * W)
    np.testing.assert_array_equal(d_x, jnp.broadcast_to(W, X.shape))
    np.testing.assert_array_equal(d_w, X.sum(axis=0, keepdims=True))


def test_a_gradient_that_the_kernel_does_not_take_is_that_of_plain_xla():
    loss, (d_x, d_w) = gradients(False, both)
    assert loss == 20 * jnp.sum(X * W)
    np.testing.assert_array_equal(d_x, 2 * jnp.broadcast_to(W, X.shape))
    np.testing.assert_array_equal(d_w, 2 * X.sum(axis=0, keepdims=True))


@dataclasses.dataclass(frozen=True)
class MadeAgain(Scaled):
    """One whose results are not worth their memory."""

    recomputed: ClassVar[bool] = True


def test_checkpoints_save_what_kernels_give_but_of_those_that_say_no():
    policy = saving_named(jax.checkpoint_policies.nothing_saveable)
    for kernel, sizes in ((Scaled("pallas_tpu"), [(2, 3), (1,)]), (MadeAgain("pallas_tpu"), [])):

        def loss(x, w, kernel=kernel):
            return jnp.sum(jnp.sin(dispatch.run(kernel, False, x, w, IDS)[0]))

        _, pull = jax.vjp(jax.checkpoint(loss, policy=policy), X, W)
        kept = sorted(leaf.shape for leaf in jax.tree.leaves(pull))
        assert kept == sorted([X.shape, W.shape, IDS.shape, *sizes]), kernel


@dataclasses.dataclass(frozen=True)
class Counted(dispatch.Kernel):
    """x + ids, and ids; without a backward pass."""

    implementation: str
    replicated: ClassVar[tuple[int, ...]] = ()
    num_differentiated: ClassVar[int] = 0

    def forward(self, x, ids):
        return self.plain(x, ids), None

    def plain(self, x, ids):
        return x + ids[:, None], ids


@pytest.mark.parametrize("fall_back", [False, True])
def test_without_a_backward_pass_plain_xla_differentiates(fall_back):
    def loss(x):
        out, ids = dispatch.run(Counted("triton"), fall_back, x, IDS)
        return jnp.sum(out**2) + jnp.sum(ids)

    found = jax.value_and_grad(loss)(X)
    assert found[0] == jnp.sum((X + 1) ** 2) + 2
    np.testing.assert_array_equal(found[1], 2 * (X + 1))
