"""Ragged prompts continued on a mesh; run on four devices by test_sharded_engine.py, prints JSON."""

import json
import sys

import jax
import numpy as np
from flax import nnx

from rat_jax.config import MeshConfig
from rat_jax.sampling import Engine, Request, SamplingParams, generate
from rat_jax.sampling.generation import mesh_of
from rat_jax.sampling.prefill import empty_prompts, read_chunk
from rat_jax.sampling.slots import decode_block, empty_slots, first_tokens, insert
from rat_jax.sharding import make_mesh, shardings
from tests.small import small_model

PROGRAMS = (empty_slots, empty_prompts, read_chunk, insert, first_tokens, decode_block)
LENGTHS = [1, 9, 3, 12, 5, 2, 8]
NEW = 12


def run(data: int, fsdp: int) -> dict:
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp), jax.devices()[: data * fsdp])
    graphdef, params = nnx.split(small_model(("rat", "local_attention")))
    model = nnx.merge(graphdef, jax.device_put(params, shardings(params, mesh)))
    prompts = [np.random.default_rng(length).integers(0, 31, length).tolist() for length in LENGTHS]
    settings = {"temperature": 1.5, "repetition_penalty": 1.2}
    compiled = sum(program._cache_size() for program in PROGRAMS)
    decoder = model.decoder()
    engine = Engine(
        decoder,
        num_slots=4,
        capacity=32,
        rule=SamplingParams.of(**settings),
        eos_id=None,
        mesh=mesh,
        chunk_sizes=(8,),
    )
    tokens = [[] for _ in prompts]
    for event in engine.serve(Request(prompt, NEW) for prompt in prompts):
        tokens[event.request] += event.tokens
    key = engine._device.slots.cache.layers[0].summary_key
    weights = next(x for x in decoder.arrays if x.ndim == 2)
    return {
        "tokens": tokens,
        "generated": generate(model, prompts[:3], max_new_tokens=2, **settings) if fsdp > 1 else None,
        "mesh_is_found": mesh_of(decoder) == (mesh if mesh.size > 1 else None),
        "compiled": sum(program._cache_size() for program in PROGRAMS) - compiled,
        "num_programs": engine.num_programs,
        "slots_of_a_device": key.addressable_shards[0].data.shape[0],
        "weights_of_a_device": weights.addressable_shards[0].data.size / weights.size,
    }


if __name__ == "__main__":
    json.dump({"1x1": run(1, 1), "2x2": run(2, 2)}, sys.stdout)
