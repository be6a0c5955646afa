"""Compiles the TPU kernels ahead of time with libtpu, for TPUs that are not there.

A program of its own (`python tpu_compile.py v5e:2x2 CASE ...`, cases as JSON), because loading libtpu lasts as long
as the process. Prints one JSON object a case.
"""

import importlib
import json
import os
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies

from pallas_kernels.attention import tpu_splash
from pallas_kernels.linear_attention import tpu as linear_attention
from pallas_kernels.linear_attention.shape import LinearAttentionShape
from pallas_kernels.rat import tpu
from pallas_kernels.rat.shape import RatShape
from rat_jax.config import MeshConfig, config_from_dict
from rat_jax.mesh import BATCH_AXES
from rat_jax.mixers import MIXERS
from rat_jax.sharding import make_mesh
from rat_jax.training.step import lower_train_step


def lower_rat(
    array,
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
) -> jax.stages.Lowered:
    """`array` gives the type of an argument of a shape and dtype."""
    shape = RatShape(1, tokens, width // head_dim, groups, head_dim, chunk, dtype, rope_base, segmented=packed)
    arrays = dict(
        projected=array(1, tokens, 3 * width + 2 * groups * head_dim, dtype=dtype),
        gate_bias=array(width, dtype="float32"),
    )
    if packed:
        arrays |= {name: array(1, tokens, dtype="int32") for name in ("positions", "segment_ids")}
    if not backward:
        return tpu.rat_forward.lower(shape, **arrays)
    shapes = jax.eval_shape(lambda arrays: tpu.rat_forward(shape, **arrays)[1], arrays)
    residuals = jax.tree.map(lambda leaf: array(*leaf.shape, dtype=leaf.dtype), shapes)
    d_out = array(1, tokens, width, dtype=dtype)
    return tpu.rat_backward.lower(shape, residuals, **arrays, d_out=d_out)


def lower_linear_attention(
    array,
    *,
    backward: bool,
    tokens: int,
    heads: int = 16,
    key_heads: int = 4,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    feature_map: str = "softmax",
    initial: tuple[int, int] | None = None,
    packed: bool = False,
) -> jax.stages.Lowered:
    """`array` gives the type of an argument of a shape and dtype; `initial` is how many rows and heads have states."""
    state = 2 * head_dim, head_dim
    arrays = dict(query=array(1, tokens, heads, head_dim, dtype=dtype))
    arrays |= {name: array(1, tokens, key_heads, head_dim, dtype=dtype) for name in ("key", "value")}
    if initial is not None:
        arrays["initial_state"] = array(*initial, *state, dtype="float32")
    if packed:
        arrays["segment_ids"] = array(1, tokens, dtype="int32")
    rows, states = (0, 0) if initial is None else initial
    sizes = (1, tokens, heads, key_heads, head_dim, dtype, feature_map, packed)
    shape = LinearAttentionShape(*sizes, initial_rows=rows, initial_heads=states)
    if not backward:
        return linear_attention.linear_attention_forward.lower(shape, **arrays)
    shapes = jax.eval_shape(lambda arrays: linear_attention.linear_attention_forward(shape, **arrays)[2], arrays)
    residuals = jax.tree.map(lambda leaf: array(*leaf.shape, dtype=leaf.dtype), shapes)
    gradients = dict(d_out=arrays["query"], d_final_state=array(1, key_heads, *state, dtype="float32"))
    return linear_attention.linear_attention_backward.lower(shape, residuals, **arrays, **gradients)


def lower_attention(
    array,
    *,
    backward: bool,
    tokens: int,
    heads: int = 16,
    key_heads: int = 4,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    window: int | None = None,
    packed: bool = True,
) -> jax.stages.Lowered:
    """`array` gives the type of an argument of a shape and dtype."""
    query = array(1, tokens, heads, head_dim, dtype=dtype)
    key = array(1, tokens, key_heads, head_dim, dtype=dtype)
    arrays = [query, key, key, array(1, tokens, dtype="int32") if packed else None]
    function = tpu_splash.forward
    if backward:
        function, arrays = tpu_splash.backward, [*arrays, query, array(1, tokens, heads, dtype="float32"), query]
    return jax.jit(lambda *arrays: function(*arrays, scale=head_dim**-0.5, window=window)).lower(*arrays)


def lower_layer(array, *, backward: bool, tokens: int, kind: str, packed: bool = True) -> jax.stages.Lowered:
    """A mixer, of grouped heads where it has them, on a row of documents a device, or on parts of four rows."""
    sizes = {"width": 512, "num_heads": 4, "dtype": "bfloat16"} | ({} if kind == "rat" else {"num_kv_heads": 2})
    graphdef, params = nnx.split(nnx.eval_shape(lambda: MIXERS[kind](**sizes, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), params)

    def loss(params, x, segment_ids):
        return jnp.sum(nnx.merge(graphdef, params)(x, segment_ids).astype(jnp.float32) ** 2)

    x = array(4, tokens, sizes["width"], dtype="bfloat16", cut=True)
    segment_ids = array(4, tokens, dtype="int32", cut=True) if packed else None
    return jax.jit(jax.grad(loss) if backward else loss).lower(params, x, segment_ids)


def lower_step(array, *, backward: bool, tokens: int, config: str) -> jax.stages.Lowered:
    """A whole train step of a config, backward pass and all: a row of documents a device."""
    values = importlib.import_module(f"configs.{config}").get_config()
    mesh = array(1, dtype="int32").sharding.mesh
    values.data.update(seq_len=tokens, global_batch_size=mesh.size, segment_documents=True)
    values.optimizer.accumulation_steps = 1
    return lower_train_step(config_from_dict(values), mesh)


_SPLASH = tpu_splash.FORWARD_KERNELS + tpu_splash.BACKWARD_KERNELS
# By op: what lowers a case, and the names of the kernels that it may hold.
OPS = {
    "attention": (lower_attention, _SPLASH),
    "layer": (lower_layer, _SPLASH),
    "step": (lower_step, _SPLASH),
    "rat": (lower_rat, tpu.FORWARD_KERNELS + tpu.BACKWARD_KERNELS),
    "linear_attention": (
        lower_linear_attention,
        linear_attention.FORWARD_KERNELS + linear_attention.BACKWARD_KERNELS,
    ),
}


def compile_case(mesh: jax.sharding.Mesh, *, op: str, **case) -> dict:
    """Kernel names found in the compiled program, its bytes per token, and GiB of arguments and temporaries."""

    def array(*shape, dtype, cut=False):  # whole on every device, or cut along its rows
        spec = jax.sharding.PartitionSpec(BATCH_AXES) if cut else jax.sharding.PartitionSpec()
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    lower, names = OPS[op]
    with jax.set_mesh(mesh):
        compiled = lower(array, **case).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    return dict(
        kernels=[name for name in names if name in text],
        temporary_bytes_per_token=memory.temp_size_in_bytes / case["tokens"],
        result_bytes_per_token=memory.output_size_in_bytes / case["tokens"],
        device_gib=(memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
    )


def main(topology: str, *cases: str) -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    for case in map(json.loads, cases):
        axes = MeshConfig(context=case.pop("context", 1))
        mesh = make_mesh(axes, list(devices if case["op"] in ("layer", "step") else devices[:1]))
        print(json.dumps(compile_case(mesh, **case)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
