"""Two training steps, and scores of tokens, on the meshes that its arguments name; prints JSON.

test_sharding.py runs it on four devices.
"""

import json
import sys

import jax
import numpy as np
from flax import nnx

from rat_jax.checkpoints.store import abstract_model
from rat_jax.data.pipeline import Batch
from rat_jax.evaluation.scoring import Scorer
from rat_jax.sharding import global_batch, leaf_names, make_mesh
from rat_jax.training.step import initial_state, train_step
from tests.tiny_run import tiny_config

MESHES = {"1x1": (1, 1, 1), "4x1": (4, 1, 1), "1x4": (1, 4, 1), "2x2": (2, 2, 2)}  # data, fsdp, accumulation steps


class RecordingScorer(Scorer):
    """Keeps what share of the rows of its batches one device has."""

    def _on_devices(self, batch):
        batch = super()._on_devices(batch)
        self.shares = {x.sharding.shard_shape(x.shape)[0] / x.shape[0] for x in jax.tree.leaves(batch)}
        return batch


def run(data: int, fsdp: int, parts: int) -> dict:
    config = tiny_config(
        "data",
        mesh__data=data,
        mesh__fsdp=fsdp,
        optimizer__accumulation_steps=parts,
        optimizer__epsilon=1e-2,  # so that steps are as exact as gradients, not their signs
    )
    mesh = make_mesh(config.mesh, jax.devices()[: data * fsdp])
    rng = np.random.default_rng(0)
    shape = (8, 16)
    batch = Batch(
        tokens=rng.integers(0, 29, shape).astype(np.int32),
        targets=rng.integers(0, 29, shape).astype(np.int32),
        loss_weights=rng.integers(0, 2, shape).astype(np.float32),
        segment_ids=np.cumsum(rng.random(shape) < 0.2, axis=1, dtype=np.int32) + 1,
    )
    compiled = train_step._cache_size()
    with jax.set_mesh(mesh):
        graphdef = abstract_model(config.model)[0]
        state = initial_state(config, mesh)
        start = [np.asarray(x) for x in jax.tree.leaves(state.params)]
        losses = []
        for _ in range(2):
            state, metrics = train_step(graphdef, config.optimizer, 6, state, global_batch(batch, mesh))
            losses.append(float(metrics.loss))
    pairs = [([1] * length, [2, length]) for length in (20, 3, 9, 14, 5)]
    scorer = RecordingScorer(nnx.merge(graphdef, state.params), mesh, context_length=16, batch_tokens=1024)
    questions = [([3] * 64 + [first], [2, last, first]) for first in range(11) for last in range(4)]
    of_questions = RecordingScorer(nnx.merge(graphdef, state.params), mesh, context_length=80, batch_tokens=8192)
    options = [score.log_probs.tolist() for score in of_questions.score(questions if data == fsdp else [])]
    arrays = dict(zip(leaf_names(state), jax.tree.leaves(state), strict=True))
    moments = arrays["opt_state.adam.mu.blocks.00_rat.mixer.in_proj.kernel"]
    return {
        "losses": losses,
        "start": [x.tolist() for x in start],
        "params": [np.asarray(x).tolist() for x in jax.tree.leaves(state.params)],
        "moments_on_a_device": moments.addressable_shards[0].data.size / moments.size,
        "compiled": train_step._cache_size() - compiled,
        "options": options,
        "tokens_of_options": of_questions.num_tokens,
        "log_probs": [score.log_probs.tolist() for score in scorer.score(pairs if data == fsdp else [])],
        "shares_of_scored_rows": [sorted(x.shares) for x in (scorer, of_questions) if data == fsdp],
    }


if __name__ == "__main__":
    results = {name: run(*MESHES[name]) for name in sys.argv[1:]}
    json.dump(results, sys.stdout)
