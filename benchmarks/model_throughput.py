"""Throughput of a config on the devices at hand: training, or decoding, in tokens a second.

  python benchmarks/model_throughput.py --config configs/rat_1b.py --batch_sizes 8 --remat dots --profile trace
  python benchmarks/model_throughput.py --config configs/rat_1b.py --batch_sizes 8 --documents 0 4
  python benchmarks/model_throughput.py --config configs/rat_1b.py --batch_sizes 1 --seq_len 262144 --context 2
  python benchmarks/model_throughput.py --config configs/rat_1b.py --decode

Training steps are those of `train.py` on random tokens: loss, gradients, clipping, AdamW, float32 parameters. One row
for each batch size (sequences of all devices) and number of documents; a batch that does not fit says so. A step is
asked for before the one before it has ended, as `train.py` does. `docs` is how many documents a sequence holds on
average, in places drawn at random, as with `config.data.segment_documents`; 0 is one sequence without segments. MFU is
that of `rat_jax.flops`. `--profile` traces one more step of each row and says what its time goes to; the program then
runs without CUDA graphs, whose kernels cannot be told apart.

Decoding takes greedy steps of random weights with caches of random numbers, spread over the positions
`--decode_first` .. `--decode_last`. `bound` is the time to read cache and weights at the measured copy bandwidth, and
`all` the memory of weights, cache and activations. `benchmarks/decode_throughput.py` compares configs, positions and
traffic.
"""

import argparse
import dataclasses
import itertools
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import card, decode_steps, step_profile
from benchmarks.timing import time_steps
from rat_jax import program
from rat_jax.config import Config, config_from_dict
from rat_jax.config_file import load_config_file
from rat_jax.data.pipeline import Batch
from rat_jax.flops import mfu
from rat_jax.model import LanguageModel
from rat_jax.paths import local_path
from rat_jax.sharding import batch_sharding, make_mesh
from rat_jax.training.step import initial_state, train_step

TRAIN_BATCH_SIZES = [4, 8, 16]
DECODE_BATCH_SIZES = [256, 736, 1024]
MESH_FIELDS = ("data", "context", "tensor")  # fsdp takes the devices that remain


def load_config(file: str, batch_size: int, accumulation_steps: int = 1, **changes: Any) -> Config:
    """The config of a file for batches of `batch_size` sequences.

    Args:
      file: of the config.
      batch_size: sequences.
      accumulation_steps: parts of a batch.
      **changes: of fields of the model, of the mesh, or of `seq_len`; None leaves the config's.
    """
    config = config_from_dict(load_config_file(file, "--config"))
    changes = {name: x for name, x in changes.items() if x is not None}
    seq_len = changes.pop("seq_len", config.data.seq_len)
    axes = {name: changes.pop(name) for name in MESH_FIELDS if name in changes}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **changes),
        data=dataclasses.replace(config.data, global_batch_size=batch_size, seq_len=seq_len),
        optimizer=dataclasses.replace(config.optimizer, accumulation_steps=accumulation_steps),
        mesh=dataclasses.replace(config.mesh, **axes),
    )


def random_batch(config: Config, documents: int) -> Batch:
    """A batch of random tokens; with `documents` > 0, that many in a sequence on average."""
    shape = (config.data.global_batch_size, config.data.seq_len)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, config.model.vocab_size, dtype=jnp.int32)
    segment_ids = None
    if documents:
        starts = jax.random.bernoulli(jax.random.key(1), (documents - 1) / config.data.seq_len, shape)
        segment_ids = 1 + jnp.cumsum(starts, axis=1, dtype=jnp.int32)
    return Batch(tokens, jnp.roll(tokens, -1, axis=1), jnp.ones(shape, jnp.float32), segment_ids)


def measure_training(
    config: Config, steps: int, trace_folder: str | None, documents: int = 0
) -> tuple[float, int, float, str]:
    """Median seconds of a step, the number of parameters, peak memory in GB, and the profile if one is wanted."""
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config.model, rngs=nnx.Rngs(0))))
        state = initial_state(config, mesh)
        parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
        batch = jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh)), random_batch(config, documents))
        static = (graphdef, config.optimizer, config.training.num_steps)
        compiled = train_step.lower(*static, state, batch).compile()
        times, state = time_steps(lambda state: compiled(state, batch), state, steps + 2, jax.block_until_ready)
        profile = ""
        if trace_folder is not None:
            profile = step_profile.report(step_profile.trace(compiled, (state, batch), trace_folder))
    return statistics.median(times[2:]), parameters, card.held_gb(compiled), profile


def train_table(flags: argparse.Namespace) -> None:
    """Prints training throughput."""
    print(f"\n{'batch':>6} {'docs':>5} {'remat':>6} {'ms a step':>10} {'tokens/s':>10} {'MFU':>7} {'GB':>6}")
    names = ("accumulation_steps", "remat", "scan_unroll", "seq_len", *MESH_FIELDS)
    for batch_size, documents in itertools.product(flags.batch_sizes or TRAIN_BATCH_SIZES, flags.documents):
        config = load_config(flags.config, batch_size, **{name: getattr(flags, name) for name in names})
        titles = f"{batch_size:>6} {documents:>5} {config.model.remat:>6}"
        try:
            seconds, parameters, memory_gb, profile = measure_training(config, flags.steps, flags.profile, documents)
        except jax.errors.JaxRuntimeError as error:  # the next batch size may fit
            print(f"{titles} {card.reason(error)}", flush=True)
            continue
        rate = batch_size * config.data.seq_len / seconds
        used = mfu(config.model, parameters, config.data.seq_len, rate / jax.device_count(), jax.devices()[0])
        share = "" if used is None else f"{used:>7.1%}"
        print(f"{titles} {1e3 * seconds:>10.1f} {rate:>10.0f} {share:>7} {memory_gb:>6.1f}", flush=True)
        if profile:
            print(f"\nprofile of one step\n{profile}\n", flush=True)


def decode_table(flags: argparse.Namespace, bandwidth: float) -> None:
    """Prints decode throughput."""
    decoder = decode_steps.random_decoder(load_config(flags.config, 1).model)
    first, last = flags.decode_first, flags.decode_last
    print(f"\npositions {first} .. {last}, {flags.decode_steps} steps\n{decode_steps.TITLES}")
    for batch_size in flags.batch_sizes or DECODE_BATCH_SIZES:
        try:
            compiled = decode_steps.lower(decoder, batch_size, last).compile()
            row = decode_steps.measure(decoder, compiled, batch_size, last, first, last, flags.decode_steps)
        except jax.errors.JaxRuntimeError as error:
            print(f"{batch_size:>6} {card.reason(error)}", flush=True)
            continue
        print(row.line(bandwidth), flush=True)


def main() -> None:
    """Prints the table that was asked for."""
    parser = program.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument(
        "--batch_sizes",
        type=int,
        nargs="+",
        default=None,
        help=f"left out: {TRAIN_BATCH_SIZES} to train, {DECODE_BATCH_SIZES} to decode",
    )
    parser.add_argument(
        "--documents", type=int, nargs="+", default=[0], help="of a training sequence on average; 0: no segments"
    )
    parser.add_argument("--accumulation_steps", type=int, default=1, help="parts of a training step")
    parser.add_argument("--remat", default=None, help="none, dots or block; left out: the config's")
    parser.add_argument("--scan_unroll", type=int, default=None, help="layers without a loop; left out: the config's")
    parser.add_argument("--seq_len", type=int, default=None, help="tokens of a sequence; left out: the config's")
    for name in MESH_FIELDS:
        parser.add_argument(f"--{name}", type=int, default=None, help=f"config.mesh.{name}; left out: the config's")
    parser.add_argument("--steps", type=int, default=5, help="training steps that are timed")
    parser.add_argument("--profile", default=None, help="folder for a trace of one training step")
    parser.add_argument("--decode", action="store_true", help="decode instead of training")
    parser.add_argument("--decode_first", type=int, default=3072, help="tokens that the rows have read")
    parser.add_argument("--decode_last", type=int, default=4096)
    parser.add_argument("--decode_steps", type=int, default=128, help="steps that are timed, spread over the positions")
    flags = parser.parse_args()
    if flags.profile is not None:
        flags.profile = str(local_path(flags.profile, "--profile"))
    card.share_memory()
    if flags.profile is not None:
        step_profile.name_every_kernel()
    print(f"{flags.config} on {jax.device_count()} x {card.describe()}")
    if flags.decode:
        bandwidth = card.measure_ceilings(3).copy_gb_per_s
        print(f"copy {bandwidth:.0f} GB/s")
        decode_table(flags, bandwidth)
    else:
        train_table(flags)


if __name__ == "__main__":
    sys.exit(program.exit_code(main))
