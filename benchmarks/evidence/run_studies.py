"""Trains and measures the models of the studies, one after the other, and goes on where it was stopped.

  python -m benchmarks.evidence.run_studies --out runs/evidence
  python -m benchmarks.evidence.run_studies --out runs/evidence --gpus 4 --models_per_gpu 2 --minutes 9
  python -m benchmarks.evidence.run_studies --out runs/evidence-small --corpus data/evidence-small/corpus --small

Models that have a result in OUT/results are left out; OUT/runs/NAME.txt has what each said. With --gpus models are
trained side by side on so many cards, one on each, or as many as --models_per_gpu says: one compiles while another
trains. With --minutes none is begun that would not end in time, judged by the longest so far. Exit codes: 0 all have a
result; 1 one of them failed, or ended without a result; 75 the minutes are over, or a signal came: the same command
goes on.
"""

import argparse
import concurrent.futures
import math
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from benchmarks.card import share_memory
from benchmarks.evidence.result_files import Failure, read_result, result_file
from benchmarks.evidence.studies import KINDS, STUDIES, Model, models
from benchmarks.evidence.train_config import CORPUS
from rat_jax import program
from rat_jax.errors import RatJaxError, RunStopped
from rat_jax.paths import local_path
from rat_jax.program import FlagError


class Sitting:
    """What is still to be done, shared by the threads of all cards."""

    def __init__(self, waiting: Sequence[Model], out: pathlib.Path, flags: Sequence[str], minutes: float | None):
        self._waiting: queue.SimpleQueue[Model] = queue.SimpleQueue()
        for model in waiting:
            self._waiting.put(model)
        self._out, self._flags = out, flags
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._longest_secs = 0.0
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self.failed: list[str] = []

    @property
    def is_over(self) -> bool:
        """Whether a further model would not end in time."""
        return self._end is not None and time.monotonic() + self._longest_secs > self._end

    def stop(self) -> None:
        """Begins no further model, and ends those under way, which are saved."""
        self._end = -math.inf
        with self._lock:
            for process in self._running:
                process.terminate()

    def work(self, card: int | None) -> None:
        """Takes models until there are none, or none that would end in time."""
        while not self.is_over:
            try:
                model = self._waiting.get_nowait()
            except queue.Empty:
                return
            self._run(model, card)

    def _run(self, model: Model, card: int | None) -> None:
        command = [sys.executable, "-m", "benchmarks.evidence.run_model", model.kind, f"--seed={model.seed}"]
        environment = os.environ | ({} if card is None else {"CUDA_VISIBLE_DEVICES": str(card)})
        started = time.monotonic()
        with (self._out / "runs" / f"{model.name}.txt").open("w") as said:
            process = subprocess.Popen([*command, *self._flags], stdout=said, stderr=said, env=environment)
            with self._lock:
                self._running.add(process)
            code = process.wait()
        secs = time.monotonic() - started
        with self._lock:
            self._running.remove(process)
            self._longest_secs = max(self._longest_secs, secs)
            try:
                outcome = _outcome(self._out, model, code)
            except RatJaxError as error:  # the others go on
                outcome, code = str(error), program.FAILED
            if code not in (0, program.INTERRUPTED):
                self.failed.append(model.name)
            print(f"{model.name}: {outcome}, {secs:.0f} s", flush=True)


def _outcome(out: pathlib.Path, model: Model, code: int) -> str:
    file = result_file(out, model)
    if code == program.INTERRUPTED:
        return "interrupted"
    if not file.exists():
        return f"no result, exit code {code}: see {out / 'runs' / model.name}.txt"
    result = read_result(file)
    if isinstance(result, Failure):
        return f"failed: {result.failed}"
    return f"loss {result.lengths[result.seq_len].loss:.4f} at {result.seq_len} tokens"


def _is_measured(out: pathlib.Path, model: Model) -> bool:
    """Whether there is a result; one that is damaged is none, and is left to the user, who learns of it now."""
    file = result_file(out, model)
    if file.exists():
        read_result(file)
        return True
    return False


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = program.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES), help="(default all)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, metavar="KIND", help="of them alone (default all)")
    parser.add_argument("--seeds", type=int, default=2, help="of each kind (default 2)")
    parser.add_argument("--corpus", default=CORPUS, help=f"(default {CORPUS})")
    parser.add_argument("--out", required=True, help="folder of runs and results")
    parser.add_argument("--gpus", type=int, help="cards to train on; left out: what jax finds")
    parser.add_argument("--models_per_gpu", type=int, default=1, help="at a time (default 1)")
    parser.add_argument("--minutes", type=float, help="after which no model is to run; left out: no end")
    parser.add_argument("--small", action="store_true", help="models that a CPU trains in seconds")
    return parser.parse_args(arguments)


def _run_all(flags: argparse.Namespace) -> int:
    for name in ("seeds", "gpus", "models_per_gpu", "minutes"):
        value = getattr(flags, name)
        if value is not None and value <= 0:
            raise FlagError(f"--{name} must be above 0, got {value}")
    out, corpus = local_path(flags.out, "--out"), local_path(flags.corpus, "--corpus")
    if not corpus.is_dir():
        raise RatJaxError(f"there is no corpus {corpus}: docs/evidence.md says how it is made")
    (out / "runs").mkdir(parents=True, exist_ok=True)
    wanted = [model for model in models(tuple(flags.studies), flags.seeds) if model.kind in (flags.kinds or KINDS)]
    waiting = [model for model in wanted if not _is_measured(out, model)]
    print(f"{len(wanted)} models, {len(wanted) - len(waiting)} of them measured before", flush=True)
    of_model = [f"--corpus={corpus}", f"--out={out}", *(["--small"] if flags.small else [])]
    sitting = Sitting(waiting, out, of_model, flags.minutes)
    cards = ([None] if flags.gpus is None else list(range(flags.gpus))) * flags.models_per_gpu
    with concurrent.futures.ThreadPoolExecutor(len(cards)) as threads:
        try:
            for done in [threads.submit(sitting.work, card) for card in cards]:
                done.result()
        except KeyboardInterrupt:
            sitting.stop()
            raise
    if sitting.failed:
        raise RunStopped(f"without a result or failed: {', '.join(sitting.failed)}")
    return 0 if all(result_file(out, model).exists() for model in wanted) else program.INTERRUPTED


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains and measures all; returns the exit code."""
    share_memory()  # a card may have several models; their processes read it
    return program.exit_code(lambda: _run_all(_parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
