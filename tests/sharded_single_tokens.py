"""Blocks of one token a row on one device and with heads on two; test_cut_meshes.py runs it, prints errors as JSON."""

import json

import jax
import numpy as np
from flax import nnx

from rat_jax.blocks import ResidualBlock
from rat_jax.config import MeshConfig
from rat_jax.mixers import MIXERS
from rat_jax.segments import whole_rows
from rat_jax.sharding import make_mesh
from tests.small import small_model_config


def run(mixer: str) -> float:
    config = small_model_config((mixer,))
    graphdef, params = nnx.split(ResidualBlock(mixer, config, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda x: x * 15 if x.ndim == 2 else x, params)  # so that all of it matters
    x = jax.random.normal(jax.random.key(1), (4, 1, config.width))

    def outputs(mesh: MeshConfig, count: int) -> np.ndarray:
        with jax.set_mesh(make_mesh(mesh, jax.devices()[:count])):
            return np.asarray(jax.jit(lambda x: nnx.merge(graphdef, params)(x, whole_rows(*x.shape[:2]))[0])(x))

    want = outputs(MeshConfig(), 1)
    return float(np.abs(outputs(MeshConfig(fsdp=1, tensor=2), 2) - want).max() / np.abs(want).max())


if __name__ == "__main__":
    print(json.dumps({mixer: run(mixer) for mixer in MIXERS if mixer != "rat"}))
