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

from tests.faults import jobs, live
from tests.faults.base import Base
from tests.faults.campaign import Verdict, judge_named, table
from tests.faults.damage import KINDS
from tests.faults.jobs import JOB_KINDS
from tests.faults.live import LIVE_KINDS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of all moments and damages (default 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="faults at a time (default one a core)")
    parser.add_argument("--only", nargs="+", default=[""], help="kinds whose names hold one of these")
    parser.add_argument(
        "--sort",
        choices=("live", "jobs", "files"),
        help="faults on live runs, on jobs of processes, in files; left out: all",
    )
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
    sorts = {
        "live": (LIVE_KINDS, live.judge_named),
        "jobs": (JOB_KINDS, jobs.judge_named),
        "files": (KINDS, judge_named),
    }
    tasks: list[tuple[Callable[..., Verdict], pathlib.Path, str, int]] = []
    for sort in [flags.sort] if flags.sort else sorts:
        kinds, function = sorts[sort]
        chosen = [kind for kind in kinds if any(map(kind.name.__contains__, flags.only))]
        _make(sort, folder / sort, chosen)
        tasks += [(function, folder / sort, kind.name, i) for kind in chosen for i in range(kind.times)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(flags.jobs, mp_context=context) as pool:
        running = [pool.submit(f, what, name, 1000 * flags.seed + i) for f, what, name, i in tasks]
        for number, future in enumerate(concurrent.futures.as_completed(running), start=1):
            verdict = future.result()
            print(f"{number}/{len(running)} {verdict.secs:5.1f} s  {verdict.kind}: {verdict.outcome}", file=sys.stderr)
            if not verdict.is_right:  # at once: the table comes at the end of an hour
                print(f"seed {verdict.seed}, {verdict.done}: {verdict.detail}", file=sys.stderr, flush=True)
            yield verdict


def _make(sort: str, folder: pathlib.Path, kinds: list) -> None:
    """What faults of these kinds are tried on."""
    if sort == "files":
        for reads in {kind.reads for kind in kinds}:
            Base.make(folder / reads, reads)
    elif kinds:
        {"live": live.make_reference, "jobs": jobs.make_reference}[sort](folder)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # faults are not to depend on what earlier runs left
    sys.exit(main())
