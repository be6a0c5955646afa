"""The RAT op by interpreted TPU kernels on one device and on each mesh of four; run by test_rat.py, it prints JSON."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec

from rat_jax.config import MeshConfig
from rat_jax.layout import from_segments
from rat_jax.ops.rat import rat_mix
from rat_jax.sharding import BATCH_AXES, make_mesh

MESHES = {"1x1": (1, 1), "4x1": (4, 1), "2x2": (2, 2)}
SIZES = {"num_heads": 2, "num_groups": 1, "chunk_size": 4, "rope_base": 10_000.0}


def run(data: int, fsdp: int) -> dict[str, list[float]]:
    """Output and gradients of four rows, two of them packed."""
    rng = np.random.default_rng(0)
    projected, gate_bias, d_out = (
        rng.normal(size=shape).astype(np.float32) for shape in ((4, 12, 3 * 16 + 2 * 8), (16,), (4, 12, 16))
    )
    segments = np.array([[1] * 12, [1] * 5 + [2] * 7, [1] * 9 + [0] * 3, [1] * 12], np.int32)

    @jax.jit
    def both(projected, gate_bias, segments, d_out):
        def mixed(projected, gate_bias):
            return rat_mix(projected, gate_bias, from_segments(segments)[0], implementation="pallas_tpu", **SIZES).out

        out, pull = jax.vjp(mixed, projected, gate_bias)
        return out, *pull(d_out)

    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp), jax.devices()[: data * fsdp])
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        arrays = [jax.device_put(x, rows) for x in (projected, segments, d_out)]
        out, d_projected, d_gate_bias = both(arrays[0], jnp.asarray(gate_bias), *arrays[1:])
    parts = len(out.sharding.device_set)
    return {
        "devices": parts,
        "out": np.where(segments[..., None] != 0, out, 0).ravel().tolist(),
        "d_projected": np.asarray(d_projected).ravel().tolist(),
        "d_gate_bias": np.asarray(d_gate_bias).tolist(),
    }


if __name__ == "__main__":
    # TPU interpret mode calls back to Python, on which devices that wait for each other can stand still.
    launch, pl.pallas_call = pl.pallas_call, lambda *args, **options: launch(*args, **options | {"interpret": True})
    json.dump({name: run(*sizes) for name, sizes in MESHES.items()}, sys.stdout)
