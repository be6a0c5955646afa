"""Times layers and models of other libraries beside ours, on one device and in one run.

  python -m benchmarks.rivals.compare --release checkouts/RAT --out runs/rivals.json

`benchmarks/rivals.md` says how the libraries are installed, what is compared and what each gave. Every library runs in
a process of its own, one after the other, so that none holds memory of the device while another is timed. A library
that is not installed, does not run or takes longer than it may has rows that say so, and the exit code is 1. What the
processes say comes on the standard error at once, each line with the seconds since its process began: what they are
at, and rows.

Train is forward and backward with the gradients of parameters and input, prefill the forward pass alone: medians, +-
the slowest minus the fastest repeat; `x ours` is the rival's time a token over ours. A batch that does not fit the
memory is halved until it does; `rows` says what was timed.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.printed_rows import Row, rows_in
from benchmarks.rivals import earlier
from benchmarks.rivals.table import layer_table, model_table, with_missing
from benchmarks.rivals.task import LAYERS, MODELS, MODULES, NOTE, OURS, RELEASE, Task
from rat_jax import program
from rat_jax.files import write_json
from rat_jax.paths import local_path
from rat_jax.program import FlagError

ROOT = Path(__file__).parents[2]
PROCESS_S = 20  # that a process has to end once it is asked to
ALL_MODELS = tuple(dict.fromkeys(model for models in MODELS.values() for model in models))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = program.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    others = [rival for rival in MODULES if rival != OURS]
    parser.add_argument("--rivals", nargs="*", choices=others, default=others, help="timed beside ours")
    parser.add_argument(
        "--ours",
        nargs="+",
        default=(),
        metavar="FILE",
        help="of an earlier --out with this device, day and versions: ours that it has are not timed again, and others "
        "after the rivals",
    )
    parser.add_argument(
        "--layers",
        nargs="*",
        choices=LAYERS,
        default=LAYERS,
        metavar="LAYER",
        help=f"in the order in which they are timed, of {', '.join(LAYERS)}",
    )
    parser.add_argument(
        "--models", nargs="*", choices=ALL_MODELS, default=ALL_MODELS, metavar="MODEL", help=", ".join(ALL_MODELS)
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 131_072], help="T")
    parser.add_argument("--tokens", type=int, default=262_144, help="of every row of the layers")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--release", default=None, help="checkout of github.com/CLAIRE-Labo/RAT")
    parser.add_argument("--timeout_s", type=float, default=900, help="for each library")
    parser.add_argument("--within_s", type=float, default=math.inf, help="for all of them, one after the other")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU takes seconds for")
    parser.add_argument("--out", default=None, help="JSON file for the rows")
    return parser.parse_args(arguments)


def task_of(flags: argparse.Namespace) -> Task:
    """What the flags ask for.

    Raises:
      FlagError: where sizes do not fit each other.
      PathError: if --release is no local path.
    """
    sizes = (64, 8, 128, (64,)) if flags.small else (flags.width, flags.heads, flags.tokens, tuple(flags.lengths))
    width, heads, tokens, lengths = sizes
    if heads < 8 or heads % 8 or width % heads:
        raise FlagError(f"--heads must be a multiple of 8 that divides --width {width}, got {heads}")
    if not 16 <= min(lengths) <= max(lengths) <= tokens or any(length % 16 for length in lengths):
        raise FlagError(f"--lengths must be multiples of 16 between 16 and --tokens {tokens}, got {list(lengths)}")
    if flags.repeats < 3:
        raise FlagError(f"--repeats must be 3 or more, got {flags.repeats}")
    release = None if flags.release is None else str(local_path(flags.release, "--release"))
    return Task(
        width, heads, tokens, lengths, tuple(flags.layers), tuple(flags.models), flags.repeats, flags.small, release
    )


class _Heard:
    """What a process prints, passed on line by line."""

    def __init__(self, rival: str):
        self.rival, self.start = rival, time.perf_counter()
        self.printed, self.said, self.at = [], "", ""

    def row_lines(self, stream: IO[str]) -> None:
        """Keeps the standard output."""
        for line in stream:
            self.printed.append(line)
            self._pass_on(line)

    def other_lines(self, stream: IO[str]) -> None:
        """Keeps the last line of the standard error that is no note, and the last that is one with its time."""
        for line in map(str.strip, stream):
            if line.startswith(NOTE):
                self.at = f"since {self._seconds():.0f} s at {line.removeprefix(NOTE)}"
            elif line:
                self.said = line
            self._pass_on(line)

    def _seconds(self) -> float:
        return time.perf_counter() - self.start

    def _pass_on(self, line: str) -> None:
        text = f"{self.rival} {self._seconds():.1f} s: {line.rstrip()}\n"  # in one piece: two threads print
        print(text, end="", file=sys.stderr, flush=True)


def run(rival: str, task: Task, timeout_s: float) -> tuple[list[Row], str]:
    """The rows that a library's process has printed, and why there may be fewer than were asked for."""
    if rival == RELEASE and task.release is None:
        return [], "--release names no checkout of it"
    command = [sys.executable, "-m", MODULES[rival], json.dumps(task.offered(rival)._asdict())]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    process, heard = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes), _Heard(rival)
    pairs = (heard.row_lines, process.stdout), (heard.other_lines, process.stderr)
    readers = [threading.Thread(target=read, args=(stream,), daemon=True) for read, stream in pairs]
    for reader in readers:
        reader.start()
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        _end(process)
    for reader in readers:  # they end with the last process that may still print
        reader.join(PROCESS_S)
    if code is None:
        why, last = f"not measured within {timeout_s:.0f} s", heard.at
    else:
        why, last = f"its process ended with exit code {code}", heard.said if code else ""
    return list(rows_in("".join(heard.printed))), f"{why}: {last[:150]}" if last else why


def _end(process: subprocess.Popen) -> None:
    """Ends a process and those that it has started: compilers keep some."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(PROCESS_S)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _values(task: Task, rows: list[Row], why: dict[str, str]) -> dict[str, Any]:
    """What --out holds."""
    card = next((row["card"] for row in rows if "card" in row), "no description of the device")
    rows = with_missing(task, (row for row in rows if "rival" in row), why)
    return {"card": card, "task": task._asdict(), "rows": rows}


def main() -> int:
    """Prints both tables; 1 if a row is missing."""
    flags = parse()
    task, start = task_of(flags), time.perf_counter()
    out = None if flags.out is None else local_path(flags.out, "--out")
    files = [earlier.read(path, task) for path in [local_path(file, "--ours") for file in flags.ours]]

    def run_within(rival: str, asked: Task) -> tuple[list[Row], str]:
        left = flags.within_s - (time.perf_counter() - start)
        return run(rival, asked, max(0.0, min(flags.timeout_s, left)))

    asked = {rival: task.offered(rival) for rival in (OURS, *flags.rivals)}
    rows, why = [], {}
    if files:
        rows, why_not = run_within(OURS, task._replace(layers=(), models=()))
        if not rows:
            raise FlagError(f"--ours needs the description of this device, which did not come: {why_not}")
        for file in files:
            earlier.check_card(file, rows[0]["card"])
            rows += file.rows
        asked[OURS], why[OURS] = earlier.lacking(asked.pop(OURS), rows[1:]), "not timed yet"  # and last
    for rival, part in asked.items():
        if part.layers or part.models:
            found, why[rival] = run_within(rival, part)
            rows += found
            print(f"{rival}: {time.perf_counter() - start:.0f} s after the start", file=sys.stderr, flush=True)
            if out is not None:  # what is there stays if this process is ended
                write_json(out, _values(task, rows, why))
    values = _values(task, rows, why)
    rows = values["rows"]
    print(f"{values['card']}\nW {task.width}, {task.heads} heads, bf16, {task.tokens} tokens, {task.repeats} repeats")
    if task.layers:
        print(f"\n{layer_table(rows)}")
    if task.models:
        print(f"\n{model_table(rows)}")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(program.exit_code(main))
