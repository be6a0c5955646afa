"""Bytes that eight devices, which hold parts of rows, exchange in a layer of RAT and of attention; prints JSON.

test_cut_meshes.py runs it.
"""

import json

import jax
import jax.numpy as jnp
from flax import nnx

from rat_jax.config import MeshConfig
from rat_jax.mixers import MIXERS
from rat_jax.sharding import batch_sharding, make_mesh
from rat_jax.training.collectives import count_collectives
from rat_jax.training.hlo import Program

ROWS, TOKENS, WIDTH, CHUNK = 2, 1024, 64, 16


def exchanged(kind: str, mesh: jax.sharding.Mesh) -> dict[str, int]:
    """Of a forward pass, by kind of collective."""
    options = {"chunk_size": CHUNK} if kind == "rat" else {}
    layer = MIXERS[kind](WIDTH, num_heads=4, rngs=nnx.Rngs(0), **options)
    graphdef, params = nnx.split(layer)
    x = jax.ShapeDtypeStruct((ROWS, TOKENS, WIDTH), jnp.float32, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x)).lower(params, x).compile()
    found = count_collectives(Program.parse(compiled.as_text()), mesh.size)
    return {name: part.num_bytes for name, part in found.items()}


if __name__ == "__main__":
    mesh = make_mesh(MeshConfig(fsdp=1, context=8))
    print(json.dumps({kind: exchanged(kind, mesh) for kind in ("rat", "attention", "local_attention", "rnn")}))
