"""What the guards of a training run cost: on the device, in the reading of tokens, at the start.

  python benchmarks/guard_costs.py --config configs/rat_1b.py --batch_size 8 --remat dots --scan_unroll 24
  python benchmarks/guard_costs.py --config configs/rat_1b.py --topology v5p:2x2x1 --fsdp 4

The step is that of `benchmarks/model_throughput.py`, with the choice between the new and the old state and without it,
in turns on one device. With `--topology` (which needs libtpu) both are compiled for a TPU instead, and what XLA counts
is compared. Tokens are random, in a file of `--gigabytes` in a temporary folder: start, first and second reading of
batches, each with digests and without, and the whole file compared.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import card
from benchmarks.model_throughput import load_config
from benchmarks.timing import time_once
from rat_jax import program
from rat_jax.config import Config, TrainingConfig
from rat_jax.data.batch import Batch
from rat_jax.data.integrity import WHOLE_BYTES
from rat_jax.data.token_file import TokenFile, TokenFileWriter
from rat_jax.data.tokenizer import ByteTokenizer
from rat_jax.data.windows import Windows
from rat_jax.model import LanguageModel
from rat_jax.sharding import batch_sharding, make_mesh
from rat_jax.training import step
from rat_jax.training.guards import Guard

PIECE_TOKENS = 1 << 24


def _steps(config: Config) -> dict[str, Callable[..., Any]]:
    """The training step with the guard and without, to be compiled."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config.model, rngs=nnx.Rngs(0))))

    def guarded(state, batch):
        return step.train_step.__wrapped__(graphdef, config.optimizer, config.training.num_steps, state, batch)

    def unguarded(state, batch):
        with mock.patch.object(step, "_kept_if", lambda is_good, new, old: new):
            return guarded(state, batch)

    return {"guarded": jax.jit(guarded, donate_argnums=0), "without": jax.jit(unguarded, donate_argnums=0)}


def time_steps(config: Config, repeats: int) -> dict[str, float]:
    """Median seconds of each step, taken in turns."""
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        state = step.initial_state(config, mesh)
        shape = (config.data.global_batch_size, config.data.seq_len)
        tokens = jax.random.randint(jax.random.key(0), shape, 0, config.model.vocab_size, dtype=jnp.int32)
        batch = Batch(tokens, jnp.roll(tokens, -1, axis=1), jnp.ones(shape, jnp.float32), None)
        batch = jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh)), batch)
        compiled = {name: function.lower(state, batch).compile() for name, function in _steps(config).items()}
        times = {name: [] for name in compiled}
        for _ in range(repeats + 1):  # the first of each is not counted
            for name, call in compiled.items():
                seconds, (state, _) = time_once(call, (state, batch), jax.block_until_ready)
                times[name].append(seconds)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def count_steps(config: Config, topology: str) -> dict[str, dict[str, float]]:
    """What XLA counts of each step on one device of a TPU topology."""
    mesh = make_mesh(config.mesh, topologies.get_topology_desc(topology, "tpu").devices)
    counts = {}
    with jax.set_mesh(mesh):
        state, batch = step.abstract_state(config, mesh), step.abstract_batch(config, mesh)
        for name, function in _steps(config).items():
            compiled = function.lower(state, batch).compile()
            cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
            counts[name] = {
                "Gflop": cost["flops"] / 1e9,
                "GB accessed": cost["bytes accessed"] / 1e9,
                "GB held": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9,
            }
    return counts


def write_tokens(path: pathlib.Path, num_bytes: float) -> TokenFile:
    """A token file of random bytes; what they are costs no reader anything."""
    tokenizer = ByteTokenizer()
    generator, writer = np.random.default_rng(0), TokenFileWriter(path, tokenizer)
    num_tokens = int(num_bytes) // np.dtype(np.uint16).itemsize
    for start in range(0, num_tokens, PIECE_TOKENS):
        ids = generator.integers(0, tokenizer.vocab_size, min(PIECE_TOKENS, num_tokens - start), dtype=np.uint16)
        writer.append(ids, 0)
    writer.close()
    return TokenFile.open(path)


def time_reading(file: TokenFile, batch_size: int, seq_len: int, repeats: int) -> Iterator[tuple[str, float]]:
    """Names and seconds of what the readers of a run do, with digests and without."""
    order = np.random.default_rng(1).permutation((len(file) - 1) // seq_len)[: batch_size * repeats]
    for name, header in (("", file.header), (", no digests", dataclasses.replace(file.header, digests_hash=None))):
        opened = TokenFile(file.path, header, file.header_hash)
        windows = Windows(opened, seq_len, segment_documents=False, first_target_id=0)
        for reading in ("batches read first", "batches read again"):
            start = time.perf_counter()
            for first in range(0, len(order), batch_size):
                windows.rows(order[first : first + batch_size].tolist())
            yield f"{reading}{name}, each", (time.perf_counter() - start) * batch_size / len(order)
    start = time.perf_counter()
    opened = TokenFile.open(file.path)
    opened.read(0, 1)
    yield "file opened, digests checked", time.perf_counter() - start
    seconds, _ = time_once(opened.verify, (), lambda nothing: nothing)
    yield f"file compared whole, {file.header.num_bytes / 1e9:.2f} GB", seconds
    yield (
        f"of it at a run's start at most, {WHOLE_BYTES / 1e9:.0f} GB a split",
        seconds * min(1.0, WHOLE_BYTES / file.header.num_bytes),
    )


def time_spike_window(repeats: int = 1000) -> float:
    """Seconds a step of the guard on the host, where losses are compared with a median of 100."""
    guard = Guard(TrainingConfig(num_steps=1, on_spike="skip", spike_window_steps=100), lambda *bad_batch: None)
    start = time.perf_counter()
    for number in range(1, repeats + 1):
        guard.max_loss(number)
        guard.judge(number, {"loss": 1.0, "grad_norm": 1.0, "param_norm": 1.0}, updated=True)
    return (time.perf_counter() - start) / repeats


def main() -> None:
    """Prints the tables."""
    parser = program.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=None, help="left out: no step is timed")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--remat", default=None, help="none, dots or block; left out: the config's")
    parser.add_argument("--scan_unroll", type=int, default=None, help="layers without a loop; left out: the config's")
    parser.add_argument("--fsdp", type=int, default=1, help="devices that share the parameters")
    parser.add_argument("--topology", default=None, help="count for this TPU, as v5p:2x2x1, instead of timing")
    parser.add_argument("--steps", type=int, default=10, help="of each kind that are timed")
    parser.add_argument("--gigabytes", type=float, default=10.0, help="of token ids; 0: none are written or read")
    flags = parser.parse_args()

    if flags.config is not None:
        config = load_config(flags.config, flags.batch_size, remat=flags.remat, scan_unroll=flags.scan_unroll)
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=flags.fsdp))
        if flags.topology is None:
            print(card.describe())
            seconds = time_steps(config, flags.steps)
            for name, value in seconds.items():
                print(f"{'step, ' + name:<40} {1e3 * value:>10.2f} ms")
            print(f"{'guard':<40} {seconds['guarded'] / seconds['without'] - 1:>10.2%} of the step")
        else:
            counts = count_steps(config, flags.topology)
            print(f"{flags.topology}, one device; {'guarded':>12} {'without':>12} {'guard':>8}")
            for name, value in counts["guarded"].items():
                other = counts["without"][name]
                print(f"{name:<24} {value:>12.3f} {other:>12.3f} {value / other - 1:>8.2%}")
    print(f"{'window of spikes':<40} {1e3 * time_spike_window():>10.3f} ms a step")
    if flags.gigabytes:
        with tempfile.TemporaryDirectory() as folder:
            file = write_tokens(pathlib.Path(folder) / "train.tokens", 1e9 * flags.gigabytes)
            for name, value in time_reading(file, batch_size=64, seq_len=4096, repeats=20):
                print(f"{name:<40} {1e3 * value:>10.1f} ms")


if __name__ == "__main__":
    sys.exit(program.exit_code(main))
