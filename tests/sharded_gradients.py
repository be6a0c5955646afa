"""Loss and gradients of a model on meshes of eight devices, against one; prints JSON. test_cut_meshes.py runs it.

Arguments: mixers with commas between them, each in a model of its own, `packed` or `whole`, and meshes: "2x1x4x1" has
data 2 and context 4.
"""

import dataclasses
import json
import sys

import jax
import numpy as np
from flax import nnx

from rat_jax.config import MeshConfig
from rat_jax.data.pipeline import Batch
from rat_jax.sharding import check_divides, global_batch, leaf_names, make_mesh, shardings
from rat_jax.training import step
from tests.small import small_config, small_model, small_model_config

ROWS, TOKENS, VOCABULARY = 8, 32, 32


def batch_of(packed: bool) -> Batch:
    rng = np.random.default_rng(0)
    tokens, targets = (rng.integers(0, VOCABULARY, (ROWS, TOKENS)).astype(np.int32) for _ in range(2))
    weights = rng.integers(0, 2, (ROWS, TOKENS)).astype(np.float32)
    segment_ids = None
    if packed:
        starts = rng.random((ROWS, TOKENS)) < 0.1
        starts[0] = False  # a row of one document, and one with padding in its middle and at its end
        segment_ids = np.cumsum(starts, axis=1, dtype=np.int32) + 1
        segment_ids[1] = [1] * 13 + [0] * 3 + [2] * 12 + [0] * 4
        weights[1] *= segment_ids[1] > 0
    return Batch(tokens, targets, weights, segment_ids)


def loss_and_gradients(graphdef, params, batch, mesh) -> tuple[float, dict[str, np.ndarray]]:
    def mean_loss(params, batch):
        return step._loss_sums(graphdef, params, batch).mean()

    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings(params, mesh))
        loss, gradients = jax.jit(jax.value_and_grad(mean_loss))(params, global_batch(batch, mesh))
    arrays = zip(leaf_names(gradients), jax.tree.leaves(gradients), strict=True)
    return float(loss), {name: np.asarray(x) for name, x in arrays}


def run(mixer: str, packed: bool, meshes: list[str]) -> dict[str, dict[str, float]]:
    mixers = dict(small_model_config((mixer,)).mixers)
    if mixer == "rat":  # so that each of eight parts has a head
        mixers["rat"] = dataclasses.replace(mixers["rat"], num_groups=1)
    sizes = {"width": 32, "num_heads": 8, "num_layers": 1, "vocab_size": VOCABULARY}
    model = small_model((mixer,), mixers=mixers, mlp_kind="geglu", **sizes)
    config = small_config()
    graphdef, params = nnx.split(model)
    batch = batch_of(packed)
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    loss, gradients = loss_and_gradients(graphdef, params, batch, one)
    errors = {}
    for name in meshes:
        sizes = dict(zip(("data", "fsdp", "context", "tensor"), map(int, name.split("x")), strict=True))
        mesh = make_mesh(MeshConfig(**sizes))
        data = dataclasses.replace(config.data, seq_len=TOKENS, global_batch_size=ROWS)
        check_divides(dataclasses.replace(config, model=model.config, data=data), mesh)
        other_loss, others = loss_and_gradients(graphdef, params, batch, mesh)
        worst = {k: float(np.linalg.norm(others[k] - g) / np.linalg.norm(g)) for k, g in gradients.items()}
        name_of_worst = max(worst, key=worst.get)
        errors[name] = {
            "loss": abs(other_loss - loss) / loss,
            "gradient": worst[name_of_worst],
            "of": name_of_worst,
        }
    return errors


if __name__ == "__main__":
    mixers, kind, *meshes = sys.argv[1:]
    json.dump({mixer: run(mixer, kind == "packed", meshes) for mixer in mixers.split(",")}, sys.stdout)
