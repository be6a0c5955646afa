"""Training throughput of a config on the devices at hand: tokens a second, and their share of the peak.

  python benchmarks/model_throughput.py --config configs/rat_1b.py --batch_sizes 4 8 16

Steps are those of `train.py` on random tokens: loss, gradients, clipping, AdamW, float32 parameters. One row for each
batch size (sequences on one device at a time); a batch that does not fit says so. MFU counts 6 N operations a token.
"""

import argparse
import dataclasses
import importlib.util
import math
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

sys.path.insert(0, str(Path(__file__).parent.parent))

from rat_jax.config import Config, config_from_dict
from rat_jax.data.pipeline import Batch
from rat_jax.metrics import peak_flops
from rat_jax.model import LanguageModel
from rat_jax.sharding import batch_sharding, make_mesh
from rat_jax.train_step import initial_state, train_step


def load_config(file: str, batch_size: int, remat: str | None) -> Config:
    """The config of a file for batches of `batch_size` sequences, in one part."""
    spec = importlib.util.spec_from_file_location("config_file", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = config_from_dict(module.get_config())
    return dataclasses.replace(
        config,
        model=config.model if remat is None else dataclasses.replace(config.model, remat=remat),
        data=dataclasses.replace(config.data, global_batch_size=batch_size),
        optimizer=dataclasses.replace(config.optimizer, accumulation_steps=1),
    )


def measure(config: Config, steps: int) -> tuple[float, int]:
    """Median seconds of a step and the number of parameters."""
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config.model, rngs=nnx.Rngs(0))))
        state = initial_state(config, mesh)
        parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
        shape = (config.data.global_batch_size, config.data.seq_len)
        tokens = jax.random.randint(jax.random.key(0), shape, 0, config.model.vocab_size, dtype=jnp.int32)
        batch = Batch(tokens, jnp.roll(tokens, -1, axis=1), jnp.ones(shape, jnp.float32), None)
        batch = jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh)), batch)
        times = []
        for _ in range(steps + 2):
            start = time.perf_counter()
            state, metrics = train_step(graphdef, config.optimizer, config.training.num_steps, state, batch)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - start)
    return statistics.median(times[2:]), parameters


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch_sizes", type=int, nargs="+", required=True)
    parser.add_argument("--remat", default=None, help="none, dots or block; left out: the config's")
    parser.add_argument("--steps", type=int, default=5)
    flags = parser.parse_args()
    device = jax.devices()[0]
    print(f"{flags.config} on {jax.device_count()} x {device.device_kind}, jax {jax.__version__}")
    print(f"{'batch':>6} {'remat':>6} {'ms a step':>10} {'tokens/s':>10} {'MFU':>6}")
    for batch_size in flags.batch_sizes:
        config = load_config(flags.config, batch_size, flags.remat)
        try:
            seconds, parameters = measure(config, flags.steps)
        except jax.errors.JaxRuntimeError as error:  # the next batch size may fit
            print(f"{batch_size:>6} {config.model.remat:>6} {str(error).splitlines()[0][:100]}", flush=True)
            continue
        rate = batch_size * config.data.seq_len / seconds
        peak = peak_flops(device)
        share = "" if peak is None else f"{6 * parameters * rate / peak / jax.device_count():>6.1%}"
        print(f"{batch_size:>6} {config.model.remat:>6} {1e3 * seconds:>10.1f} {rate:>10.0f} {share}", flush=True)


if __name__ == "__main__":
    main()
