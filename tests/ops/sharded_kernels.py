"""Ops by interpreted TPU kernels on one device and on a mesh of four; run by test_sharded_kernels.py, prints JSON.

Of the MLP, which has no such kernels, with plain XLA in the place of those for GPUs.

Its arguments name the ops.
"""

import json
import sys
from unittest import mock

import jax
import numpy as np
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec

from rat_jax.config import MeshConfig
from rat_jax.mesh import BATCH_AXES
from rat_jax.ops import dispatch
from rat_jax.ops.attention import attention
from rat_jax.ops.mlp import DownBackward, Up, gelu_mlp
from rat_jax.ops.rat import rat_mix
from rat_jax.ops.residual_linear_attention import residual_linear_attention
from rat_jax.segments import from_segments
from rat_jax.sharding import make_mesh

MESHES = {"one": (1, 1, 1), "rows": (2, 2, 1), "tokens": (1, 1, 4), "both": (2, 1, 2)}  # data, fsdp, context
SIZES = {"num_heads": 2, "num_groups": 1, "chunk_size": 4, "rope_base": 10_000.0}


def rat(rng, segments):
    """Output and gradients of RAT."""
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in ((4, 16, 3 * 16 + 2 * 8), (16,))]

    def mixed(projected, gate_bias):
        documents = None if segments is None else from_segments(segments)[0]
        return rat_mix(projected, gate_bias, documents, implementation="pallas_tpu", **SIZES).out

    return mixed, arrays, rng.normal(size=(4, 16, 16)).astype(np.float32)


def linear(rng, segments):
    """Output and gradients of residual linear attention, with one initial state for all rows."""
    shapes = ((4, 16, 2, 8), (4, 16, 1, 8), (4, 16, 1, 8), (1, 1, 16, 8))
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]

    def attended(query, key, value, initial_state):
        options = {"window": 2, "initial_state": initial_state, "segment_ids": segments}
        return residual_linear_attention(query, key, value, implementation="pallas_tpu", **options).out

    return attended, arrays, rng.normal(size=(4, 16, 2, 8)).astype(np.float32)


def mlp(rng, segments):
    """Output and gradients of the MLP; each token by itself, so that documents do not matter."""
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in ((4, 16, 8), (8, 12), (12, 8))]

    def applied(x, up, down):
        with mock.patch.object(dispatch, "choose", return_value="mosaic_gpu"):
            return gelu_mlp(x, up, down)

    return applied, arrays, rng.normal(size=(4, 16, 8)).astype(np.float32)


def windowed(rng, segments):
    """Output and gradients of attention in a window, with grouped heads."""
    arrays = [rng.normal(size=(4, 16, heads, 8)).astype(np.float32) for heads in (2, 1, 1)]

    def attended(query, key, value):
        return attention(query, key, value, window=3, segment_ids=segments, implementation="pallas_tpu").out

    return attended, arrays, rng.normal(size=(4, 16, 2, 8)).astype(np.float32)


def causal(rng, segments):
    """Output and gradients of attention to all earlier tokens."""
    arrays = [rng.normal(size=(4, 16, heads, 8)).astype(np.float32) for heads in (2, 1, 1)]

    def attended(query, key, value):
        return attention(query, key, value, segment_ids=segments, implementation="pallas_tpu").out

    return attended, arrays, rng.normal(size=(4, 16, 2, 8)).astype(np.float32)


def run(make, packed: bool, data: int, fsdp: int, context: int) -> dict:
    """Output and gradients of four rows, some of them packed or padded if so wanted, as lists."""
    rows = [[1] * 16, [1] * 5 + [2] * 10 + [3], [1] * 7 + [0] * 2 + [2] * 7, [1] * 2 + [2] * 9 + [0] * 5]
    segments = np.array(rows, np.int32) if packed else np.ones((4, 16), np.int32)
    function, arrays, d_out = make(np.random.default_rng(0), segments if packed else None)
    d_out = d_out * (segments != 0).reshape(4, 16, *[1] * (d_out.ndim - 2))

    @jax.jit
    def both(arrays, d_out):
        out, pull = jax.vjp(function, *arrays)
        return out, pull(d_out)

    config = MeshConfig(data=data, fsdp=fsdp, context=context)
    mesh = make_mesh(config, jax.devices()[: data * fsdp * context])
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        arrays, d_out = jax.tree.map(lambda x: jax.device_put(x, rows) if x.shape[0] == 4 else x, (arrays, d_out))
        out, gradients = both(arrays, d_out)
    is_token = (segments != 0).reshape(4, 16, *[1] * (out.ndim - 2))
    return {
        "devices": len(out.sharding.device_set),
        "results": [np.asarray(x).ravel().tolist() for x in (np.where(is_token, out, 0), *gradients)],
    }


if __name__ == "__main__":
    # TPU interpret mode calls back to Python, on which devices that wait for each other can stand still.
    launch, pl.pallas_call = pl.pallas_call, lambda *args, **options: launch(*args, **options | {"interpret": True})
    for kernel in (Up, DownBackward):
        kernel.forward = lambda self, *arguments: (self.plain(*arguments), None)
    ops = {make.__name__: make for make in (rat, linear, mlp, windowed, causal)}
    kind, *names = sys.argv[1:]
    found = {op: {name: run(ops[op], kind == "packed", *sizes) for name, sizes in MESHES.items()} for op in names}
    json.dump(found, sys.stdout)
