"""The training step as a function."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rat_jax.checkpoints.store import abstract_model
from rat_jax.data.pipeline import TrainData
from rat_jax.sharding import global_batch, make_mesh
from rat_jax.training import train
from rat_jax.training.step import batch_loss, initial_state, train_step
from tests.equations import equations
from tests.tiny_run import tiny_config


class TestTrainStep:
    """The step as a function."""

    @pytest.fixture
    def batch(self, config):
        data = TrainData(config.data, vocab_size=config.model.vocab_size, seed=0)
        batch = next(data)
        data.close()
        weights = batch.loss_weights.copy()
        weights[:3, ::2] = 0  # rows of unequal weight, so that a mean of means would differ
        return batch._replace(loss_weights=weights)

    def run(self, corpus, batch, num_parts):
        config = tiny_config(corpus, optimizer__accumulation_steps=num_parts)
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            graphdef = abstract_model(config.model)[0]
            state = initial_state(config, mesh)
            return train_step(graphdef, config.optimizer, 6, state, global_batch(batch, mesh))

    @pytest.mark.parametrize("num_parts", [pytest.param(2, marks=pytest.mark.slow), 4])
    def test_accumulation_changes_nothing(self, corpus, batch, num_parts):
        whole, whole_metrics = self.run(corpus, batch, 1)
        parts, metrics = self.run(corpus, batch, num_parts)
        np.testing.assert_allclose(metrics.loss, whole_metrics.loss, rtol=1e-6)
        np.testing.assert_allclose(metrics.grad_norm, whole_metrics.grad_norm, rtol=1e-5)
        for a, b in zip(
            jax.tree.leaves(parts.opt_state["adam"].mu), jax.tree.leaves(whole.opt_state["adam"].mu), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize("num_parts", [1, 2])
    def test_matrices_are_cast_once(self, corpus, batch, num_parts):
        """Not in each layer, pass and part of a batch; sums over parts and what the optimizer holds are float32."""
        config = tiny_config(
            corpus, model__dtype="bfloat16", model__remat="dots", optimizer__accumulation_steps=num_parts
        )
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            graphdef = abstract_model(config.model)[0]
            state = initial_state(config, mesh)
            matrices = [x.shape for x in jax.tree.leaves(state.params["blocks"]) if x.ndim == 3]
            casts, sums = collections.Counter(), []
            arguments = state, global_batch(batch, mesh)
            step = functools.partial(train_step, graphdef, config.optimizer, 6)
            for equation in equations(jax.make_jaxpr(step)(*arguments).jaxpr):
                if equation.primitive.name == "scan":  # over the parts; that over layers has arrays of a layer
                    inner = equations(equation.params["jaxpr"].jaxpr)
                    added = [x.outvars[0].aval for x in inner if x.primitive.name in ("add", "add_any")]
                    sums += [x for x in added if x.shape in matrices]
                if equation.primitive.name == "convert_element_type" and equation.params["new_dtype"] == jnp.bfloat16:
                    casts[equation.invars[0].aval.shape] += 1
            assert {shape: casts[shape] for shape in matrices} == collections.Counter(matrices)
            assert not any(casts[shape[1:]] for shape in matrices)
            assert len(sums) == (len(matrices) if num_parts > 1 else 0)
            assert all(x.dtype == jnp.float32 for x in sums)
            after = step(*arguments)[0]
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(after.params))

    @pytest.mark.parametrize("pattern", [("rat", "local_attention"), ("rattention", "gated_deltanet")])
    def test_casting_once_changes_no_gradient(self, corpus, batch, pattern):
        config = tiny_config(corpus, model__dtype="bfloat16", model__pattern=pattern, optimizer__clip_norm=1e9)
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            graphdef = abstract_model(config.model)[0]
            state = initial_state(config, mesh)
            whole = global_batch(batch, mesh)
            total = batch.loss_weights.sum()
            expected = jax.jit(jax.grad(lambda params: batch_loss(graphdef, params, whole).loss / total))(state.params)
            step = train_step(graphdef, config.optimizer, 6, state, whole)[0]
        found = step.opt_state["adam"].mu  # of the first step: 1 - beta1 of the gradient
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert a.dtype == jnp.float32
            b = (1 - config.optimizer.beta1) * np.asarray(b)
            assert np.linalg.norm(a - b) <= 2e-2 * np.linalg.norm(b)

    def test_loss_is_the_mean_over_targets(self, config, corpus, batch):
        _, metrics = self.run(corpus, batch, 1)
        mesh = make_mesh(config.mesh)
        graphdef = abstract_model(config.model)[0]
        model = nnx.merge(graphdef, initial_state(config, mesh).params)
        logits = jax.jit(type(model).__call__)(model, batch.tokens, batch.segment_ids)
        log_probs = jax.nn.log_softmax(logits)
        losses = -np.take_along_axis(np.asarray(log_probs), batch.targets[..., None], axis=-1)[..., 0]
        expected = (losses * batch.loss_weights).sum() / batch.loss_weights.sum()
        np.testing.assert_allclose(metrics.loss, expected, rtol=1e-5)
        assert metrics.num_targets == batch.loss_weights.sum()

    def test_a_batch_without_targets_has_no_loss_and_no_gradient(self, corpus, batch):
        _, metrics = self.run(corpus, batch._replace(loss_weights=np.zeros_like(batch.loss_weights)), 1)
        assert metrics.loss == metrics.grad_norm == metrics.num_targets == 0

    def test_a_second_run_of_the_same_shapes_compiles_nothing(self, config, uninterrupted, tmp_path):
        compiled = train_step._cache_size(), batch_loss._cache_size()
        train(config, tmp_path / "run")
        assert (train_step._cache_size(), batch_loss._cache_size()) == compiled
