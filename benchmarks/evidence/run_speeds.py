"""Times the training steps of the studies' kinds, one after the other, on a card that does nothing else.

  python -m benchmarks.evidence.run_speeds --out runs/evidence --kinds attention rat

Writes OUT/speeds/KIND.json, which `report.py` shows beside the losses; kinds that have one are left out. The steps are
those of `benchmarks/model_throughput.py`, on random tokens: the median of 30.
"""

import argparse
import sys
from collections.abc import Sequence

import jax

from benchmarks import card
from benchmarks.evidence.result_files import read_speed, speed_file
from benchmarks.evidence.studies import KINDS, STUDIES
from benchmarks.evidence.train_config import SMALL, get_config
from benchmarks.model_throughput import measure_training
from rat_jax import program
from rat_jax.config import config_from_dict
from rat_jax.files import write_json
from rat_jax.paths import local_path
from rat_jax.program import FlagError


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = program.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = STUDIES["mixers"].kinds
    parser.add_argument("--kinds", nargs="+", choices=KINDS, metavar="KIND", default=default, help="(default mixers)")
    parser.add_argument("--steps", type=int, default=30, help="that are timed (default 30)")
    parser.add_argument("--out", required=True, help="folder of runs and results")
    parser.add_argument("--small", action="store_true", help="models that a CPU trains in seconds")
    return parser.parse_args(arguments)


def _run(flags: argparse.Namespace) -> None:
    if flags.steps <= 0:
        raise FlagError(f"--steps must be above 0, got {flags.steps}")
    out = local_path(flags.out, "--out")
    there = [kind for kind in flags.kinds if speed_file(out, kind).exists()]
    for kind in there:
        read_speed(speed_file(out, kind))  # one that is damaged is said to be before the others are timed
    for kind in dict.fromkeys(kind for kind in flags.kinds if kind not in there):
        file = speed_file(out, kind)
        file.parent.mkdir(parents=True, exist_ok=True)
        config = config_from_dict(get_config(f"{kind}{SMALL if flags.small else ''}"))
        secs, _, memory_gb, _ = measure_training(config, flags.steps, None)
        speed = config.data.global_batch_size * config.data.seq_len / secs
        values = {"kind": kind, "tokens_per_second": speed, "memory_gb": memory_gb, "on": card.describe()}
        write_json(file, values)
        print(f"{kind}: {1e3 * secs:.1f} ms a step, {speed:,.0f} tokens/s", flush=True)
        jax.clear_caches()


def main(arguments: Sequence[str] | None = None) -> int:
    """Times all; returns the exit code."""
    card.share_memory()
    return program.exit_code(lambda: _run(_parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
