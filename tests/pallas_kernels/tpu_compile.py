"""Compiles the TPU kernels ahead of time with libtpu, for TPUs that are not there.

A program of its own (`python tpu_compile.py v5e:2x2 CASE ...`, cases as JSON), because loading libtpu lasts as long
as the process. Prints one JSON object a case.
"""

import json
import os
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from pallas_kernels import tpu


def compile_case(
    mesh: jax.sharding.Mesh,
    *,
    backward: bool,
    tokens: int,
    width: int = 2048,
    head_dim: int = 128,
    groups: int = 2,
    chunk: int = 16,
    dtype: str = "bfloat16",
    rope_base: float | None = 10000.0,
    packed: bool = False,
) -> dict:
    """Kernel names found in the compiled program, and its temporary bytes per token."""
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    settings = dict(num_groups=groups, chunk_size=chunk, rope_base=rope_base)
    arrays = dict(
        projected=array(1, tokens, 3 * width + 2 * groups * head_dim), gate_bias=array(width, dtype=jnp.float32)
    )
    if packed:
        arrays |= {name: array(1, tokens, dtype=jnp.int32) for name in ("positions", "segment_ids")}
    with jax.set_mesh(mesh):
        if backward:
            shapes = jax.eval_shape(lambda arrays: tpu.rat_forward(**arrays, **settings)[1], arrays)
            residuals = jax.tree.map(lambda leaf: array(*leaf.shape, dtype=leaf.dtype), shapes)
            lowered = tpu.rat_backward.lower(residuals, **arrays, d_out=array(1, tokens, width), **settings)
        else:
            lowered = tpu.rat_forward.lower(**arrays, **settings)
        compiled = lowered.compile()
    text = compiled.as_text()
    return dict(
        kernels=[name for name in tpu.FORWARD_KERNELS + tpu.BACKWARD_KERNELS if name in text],
        temporary_bytes_per_token=compiled.memory_analysis().temp_size_in_bytes / tokens,
    )


def main(topology: str, *cases: str) -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("chip",), axis_types=(jax.sharding.AxisType.Auto,))
    for case in cases:
        print(json.dumps(compile_case(mesh, **json.loads(case))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
