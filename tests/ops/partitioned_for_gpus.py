"""Attention by cuDNN over parts of rows, partitioned for two devices; prints JSON of what each compilation said.

XLA partitions before it looks for the custom calls, which the CPU lacks: this needs no GPU. Run by
test_sharded_kernels.py.
"""

import json
import sys

import jax
import jax.numpy as jnp

from rat_jax.config import MeshConfig
from rat_jax.ops import platform
from rat_jax.ops.attention import attention
from rat_jax.sharding import batch_sharding, make_mesh

TOKENS = 64


def said(window: int | None, mesh: jax.sharding.Mesh) -> str:
    def loss(query, key, value):
        return attention(query, key, value, window=window, implementation="cudnn").out.astype(jnp.float32).sum()

    arrays = [jax.ShapeDtypeStruct((2, TOKENS, 2, 8), jnp.bfloat16, sharding=batch_sharding(mesh))] * 3
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*arrays)
        try:
            lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return str(error)
    return "compiled"


if __name__ == "__main__":
    platform.expected_platform = lambda: "gpu"
    mesh = make_mesh(MeshConfig(fsdp=1, context=2))
    windows = [None if window == "none" else int(window) for window in sys.argv[1:]]
    print(json.dumps([said(window, mesh) for window in windows]))
