"""Injects faults into trainings and their files, and prints what came of them; the exit code is 1 if anything is wrong.

python -m tests.faults                       all of them: `make faults`
python -m tests.faults --seed 7 --jobs 8     other moments, other damage
python -m tests.faults --only killed         the kinds whose names hold a word
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from tests.faults import live
from tests.faults.base import Base
from tests.faults.campaign import Verdict, judge_named, table
from tests.faults.damage import KINDS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of all moments and damages (default 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="faults at a time (default one a core)")
    parser.add_argument("--only", nargs="+", default=[""], help="kinds whose names hold one of these")
    parser.add_argument("--sort", choices=("live", "files"), help="faults on live runs, or in files; left out: both")
    parser.add_argument("--out", type=pathlib.Path, help="where trainings to compare with are kept for the next time")
    flags = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        folder = flags.out or pathlib.Path(temporary)
        verdicts = list(_run(folder, flags))
    print(table(verdicts))
    print(f"seed {flags.seed}; {(time.monotonic() - start) / 60:.1f} minutes")
    return 0 if all(verdict.is_right for verdict in verdicts) else 1


def _run(folder: pathlib.Path, flags: argparse.Namespace) -> Iterator[Verdict]:
    reference = None if flags.sort == "files" else live.make_reference(folder / "live")
    base = Base.make(folder / "files")
    tasks: list[tuple[Callable[..., Verdict], object, str, int]] = []
    sorts = {"live": (live.LIVE_KINDS, live.judge_named, reference), "files": (KINDS, judge_named, base.path)}
    for kinds, function, what in [sorts[flags.sort]] if flags.sort else sorts.values():
        tasks += [
            (function, what, k.name, i)
            for k in kinds
            if any(map(k.name.__contains__, flags.only))
            for i in range(k.times)
        ]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(flags.jobs, mp_context=context) as pool:
        running = [pool.submit(f, what, name, 1000 * flags.seed + i) for f, what, name, i in tasks]
        for number, future in enumerate(concurrent.futures.as_completed(running), start=1):
            verdict = future.result()
            print(f"{number}/{len(running)} {verdict.secs:5.1f} s  {verdict.kind}: {verdict.outcome}", file=sys.stderr)
            yield verdict


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # faults are not to depend on what earlier runs left
    sys.exit(main())
