"""The optimizer against torch, the schedule against its formula and the release."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rat_jax.config import OptimizerConfig
from rat_jax.training.optimizer import learning_rate_schedule, make_optimizer

torch = pytest.importorskip("torch")

CONFIG = OptimizerConfig(
    learning_rate=8e-4,
    min_learning_rate=1e-6,
    warmup_fraction=0.05,
    beta1=0.9,
    beta2=0.95,
    epsilon=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
    accumulation_steps=1,
)


@pytest.mark.parametrize(("num_steps", "fraction"), [(20, 0.05), (100, 0.29), (50, 0.0), (10, 1.0), (52452, 0.05)])
def test_schedule(num_steps, fraction):
    schedule = learning_rate_schedule(dataclasses.replace(CONFIG, warmup_fraction=fraction), num_steps)
    warmup = round(100 * fraction) * num_steps // 100
    steps = np.unique(np.linspace(0, num_steps - 1, 200).astype(int))
    rates = jax.jit(schedule)(jnp.asarray(steps))
    for step, rate in zip(steps, rates, strict=True):
        if step < warmup:
            expected = 8e-4 * (step + 1) / warmup
        else:
            cosine = math.cos(math.pi * (step - warmup) / (num_steps - warmup))
            expected = 1e-6 + (8e-4 - 1e-6) * (1 + cosine) / 2
        assert abs(float(rate) - expected) < 1e-9


def test_first_and_last_values_of_the_schedule_are_those_that_the_config_documents():
    for fraction, first in ((0.0, 8e-4), (0.5, 8e-4 / 5)):
        schedule = learning_rate_schedule(dataclasses.replace(CONFIG, warmup_fraction=fraction), 10)
        assert float(schedule(0)) == pytest.approx(first, rel=1e-6)
        assert float(schedule(10)) == pytest.approx(1e-6, rel=1e-3)  # one step after the last
        assert float(schedule(9)) > 1e-6


def test_schedule_reaches_its_peak_when_the_warm_up_ends():
    schedule = learning_rate_schedule(dataclasses.replace(CONFIG, warmup_fraction=0.5), 10)
    assert [round(float(schedule(step)) / 8e-4, 4) for step in range(6)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]


def test_steps_equal_those_of_torch():
    rng = np.random.default_rng(0)
    start = {"a": rng.normal(size=(4, 3)), "b": rng.normal(size=(5,))}
    start = {name: value.astype(np.float32) for name, value in start.items()}
    optimizer = make_optimizer(CONFIG, 8)
    schedule = learning_rate_schedule(CONFIG, 8)
    params = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(params)
    twins = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    twin = torch.optim.AdamW(twins.values(), lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    update = jax.jit(optimizer.update)
    for step in range(8):
        scale = 10.0 ** (step % 3 - 2)  # clipped and not
        grads = {name: (scale * rng.normal(size=value.shape)).astype(np.float32) for name, value in start.items()}
        updates, state = update(jax.tree.map(jnp.asarray, grads), state, params)
        params = optax.apply_updates(params, updates)
        for name, parameter in twins.items():
            parameter.grad = torch.tensor(grads[name])
        torch.nn.utils.clip_grad_norm_(twins.values(), CONFIG.clip_norm)
        twin.param_groups[0]["lr"] = float(schedule(step))
        twin.step()
        for name, parameter in twins.items():
            np.testing.assert_allclose(params[name], parameter.detach().numpy(), rtol=1e-5, atol=1e-7)


def test_zero_gradients_only_decay_the_weights():
    optimizer = make_optimizer(dataclasses.replace(CONFIG, warmup_fraction=0.0), 10)
    params = {"a": jnp.full((3,), 2.0)}
    updates, _ = optimizer.update({"a": jnp.zeros((3,))}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["a"], -8e-4 * 0.1 * 2.0, rtol=1e-6)
