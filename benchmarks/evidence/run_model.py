"""Trains one model of the studies and measures it: what `run_studies.py` does for each.

  python -m benchmarks.evidence.run_model rat_swa --seed 1 --out runs/evidence

Writes OUT/results/KIND-SEED.json; the run itself lies in OUT/runs/KIND-SEED, and is deleted then unless --keep is
given. A run that was stopped goes on, and its seconds are those of all its sittings. One that failed leaves
{"failed": why} as its result.
"""

import argparse
import math
import pathlib
import shutil
import sys
import time
from collections.abc import Sequence

import jax

from benchmarks.evidence.measurement import check_split, measure
from benchmarks.evidence.result_files import result_file
from benchmarks.evidence.studies import KINDS, Model
from benchmarks.evidence.train_config import CORPUS, SMALL, get_config
from rat_jax import program
from rat_jax.compilation_cache import use_cache
from rat_jax.config import config_from_dict
from rat_jax.errors import RatJaxError, RunStopped
from rat_jax.files import write_json, write_text
from rat_jax.paths import local_path
from rat_jax.training import train


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = program.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS, metavar="kind", help=", ".join(KINDS))
    parser.add_argument("--seed", type=int, default=0, help="of parameters and of the order of the data (default 0)")
    parser.add_argument("--corpus", default=CORPUS, help=f"(default {CORPUS})")
    parser.add_argument("--out", required=True, help="folder of runs and results")
    parser.add_argument("--small", action="store_true", help="a model that a CPU trains in seconds")
    parser.add_argument("--keep", action="store_true", help="the run, with the model's parameters")
    return parser.parse_args(arguments)


def _run(flags: argparse.Namespace) -> int:
    started = time.monotonic()
    model, out = Model(flags.kind, flags.seed), local_path(flags.out, "--out")
    config = get_config(f"{flags.kind}{SMALL if flags.small else ''}")
    config.seed = flags.seed
    config.data.path = str(local_path(flags.corpus, "--corpus"))
    workdir, file = out / "runs" / model.name, result_file(out, model)
    sittings = out / "runs" / f"{model.name}.seconds"
    use_cache(None)
    file.parent.mkdir(parents=True, exist_ok=True)
    before = _seconds(sittings) if sittings.exists() else 0.0
    check_split(config.data.path, config.data.seq_len)
    values = {"kind": model.kind, "seed": model.seed}
    try:
        if not train(config_from_dict(config), workdir).finished:
            return program.INTERRUPTED
        values |= measure(workdir)
    except (RunStopped, jax.errors.JaxRuntimeError) as error:  # a finding, as a loss is
        values["failed"] = str(error).splitlines()[0]
    finally:
        secs = round(before + time.monotonic() - started, 1)
        write_text(sittings, str(secs))
    write_json(file, values | {"seconds": secs})
    sittings.unlink()
    if not flags.keep:
        shutil.rmtree(workdir)
    print(f"{model.name}: {values['failed']}" if "failed" in values else f"{model.name}: written to {file}")
    return program.FAILED if "failed" in values else 0


def _seconds(file: pathlib.Path) -> float:
    """Of the sittings before."""
    try:
        secs = float(file.read_text())
    except ValueError:  # no UTF-8, too
        secs = math.nan
    if not math.isfinite(secs):
        raise RatJaxError(
            f"{file} is damaged: it holds no seconds; delete it and give the command again, which does not count those "
            "before"
        )
    return secs


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains and measures; returns the exit code."""
    return program.exit_code(lambda: _run(_parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
