"""Convolved heads on one device and on meshes of four; run by test_convolved_heads.py, prints JSON."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from rat_jax.config import MeshConfig
from rat_jax.ops import convolved_heads
from rat_jax.sharding import make_mesh

MESHES = {"tokens": {"context": 4}, "heads": {"context": 2, "tensor": 2}}
IDS = np.array([[1] * 8, [1] * 3 + [2] * 3 + [0] + [3]], np.int32)
HEADS, WIDTHS = 2, (8, 8, 6)  # of queries, keys and values


def run(sizes: dict[str, int]) -> list[list[float]]:
    """Results and gradients, in the order of channels that they have on one device."""
    draw, channels, parts = np.random.default_rng(0), sum(WIDTHS), sizes.get("tensor", 1)
    projected = draw.standard_normal((2, 8, channels)).astype(np.float32)
    taps = draw.standard_normal((4, channels)).astype(np.float32)
    # Of each part of heads the queries, keys and values.
    columns = np.split(np.arange(channels), np.cumsum(WIDTHS)[:-1])
    order = np.concatenate([x.reshape(parts, -1) for x in columns], axis=1).ravel()
    weights = [draw.standard_normal((2, 8, HEADS, n // HEADS)) * (IDS != 0)[..., None, None] for n in WIDTHS]

    @jax.jit
    def both(projected, taps):
        def heads(projected, taps):
            return convolved_heads(projected, taps, jnp.asarray(IDS), num_heads=HEADS, key_dim=4)[:3]

        results, pull_back = jax.vjp(heads, projected, taps)
        return *results, *pull_back(tuple(jnp.asarray(w, jnp.float32) for w in weights))

    devices = jax.devices()[: 4 if sizes else 1]
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=1, **sizes), devices)):
        *results, d_projected, d_taps = both(projected[..., order], taps)
        assert len(results[0].sharding.device_set) == len(devices)
    results = [np.where((IDS != 0)[..., None, None], x, 0) for x in results]
    found = *results, np.asarray(d_projected)[..., np.argsort(order)], d_taps
    return [np.asarray(x, np.float64).ravel().tolist() for x in found]


if __name__ == "__main__":
    json.dump({name: run(sizes) for name, sizes in ({"whole": {}} | MESHES).items()}, sys.stdout)
