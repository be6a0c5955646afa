"""Counts the collectives of programs compiled for four devices; test_collectives.py runs it. Prints JSON."""

import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rat_jax.sharding import make_mesh
from rat_jax.training.collectives import count_collectives
from rat_jax.training.hlo import Program
from rat_jax.training.step import lower_train_step
from tests.tiny_run import tiny_config


def counted(lowered: jax.stages.Lowered) -> dict[str, list[int]]:
    found = count_collectives(Program.parse(lowered.compile().as_text()), len(jax.devices()))
    assert not any(part.looped for part in found.values())
    return {kind: [part.count, part.num_bytes] for kind, part in found.items()}


def loop() -> jax.stages.Lowered:
    """Six turns of four collectives, each of 1 KiB of each device."""

    def turn(x, _):
        y = jnp.sin(jax.lax.ppermute(x, "d", [(0, 1), (1, 2), (2, 3), (3, 0)]))
        y = y + jax.lax.psum_scatter(y, "d", scatter_dimension=0, tiled=True).sum()
        y = jnp.cos(y) + jax.lax.all_gather(y, "d", axis=0, tiled=True).sum()
        return jnp.tanh(jax.lax.psum(y, "d")), None

    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("d")
    local = jax.shard_map(
        lambda x: jax.lax.scan(turn, x, length=6)[0], mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False
    )
    return jax.jit(local).lower(jax.ShapeDtypeStruct((16, 64), jnp.float32))


def step(unroll: int) -> jax.stages.Lowered:
    # With "none" what was gathered for the forward pass would be kept for the backward one, where no loop is between.
    config = tiny_config("data", mesh__fsdp=4, model__pattern=("rnn",), model__scan_unroll=unroll, model__remat="block")
    return lower_train_step(config, make_mesh(config.mesh))


if __name__ == "__main__":
    json.dump({"loop": counted(loop()), "scanned": counted(step(1)), "unrolled": counted(step(2))}, sys.stdout)
