"""Bytes that eight devices, which hold parts of rows, exchange in a layer of RAT and of attention; prints JSON.

test_cut_meshes.py runs it, and with a topology of TPUs, which compiles the backward pass too, test_tpu_compile.py.
"""

import json
import sys

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rat_jax.config import MeshConfig
from rat_jax.mixers import MIXERS
from rat_jax.sharding import batch_sharding, make_mesh
from rat_jax.training.collectives import count_collectives
from rat_jax.training.hlo import Program
from rat_jax.training.topology import topology_devices

ROWS, TOKENS, WIDTH, CHUNK = 2, 1024, 64, 16


def exchanged(kind: str, mesh: jax.sharding.Mesh, backward: bool) -> dict[str, int]:
    """Of a forward pass, or of the gradient of a layer's input, by kind of collective."""
    options = {"chunk_size": CHUNK} if kind == "rat" else {}
    layer = MIXERS[kind](WIDTH, num_heads=4, rngs=nnx.Rngs(0), **options)
    graphdef, params = nnx.split(layer)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P())), params)
    x = jax.ShapeDtypeStruct((ROWS, TOKENS, WIDTH), jnp.float32, sharding=batch_sharding(mesh))

    def run(params, x):
        return nnx.merge(graphdef, params)(x)

    def gradient(params, x):
        return jax.grad(lambda x: jnp.sum(run(params, x) ** 2))(x)

    with jax.set_mesh(mesh):
        compiled = jax.jit(gradient if backward else run).lower(params, x).compile()
    found = count_collectives(Program.parse(compiled.as_text()), mesh.size)
    return {name: part.num_bytes for name, part in found.items()}


if __name__ == "__main__":
    devices = topology_devices(sys.argv[1]) if sys.argv[1:] else None
    mesh = make_mesh(MeshConfig(fsdp=1, context=8), devices)
    kinds = ("rat", "attention") if devices else ("rat", "attention", "local_attention", "rnn")
    print(json.dumps({kind: exchanged(kind, mesh, devices is not None) for kind in kinds}))
