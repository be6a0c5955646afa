"""Faults that meet a training run while it goes, in processes of its own, at a moment drawn from a seed.

Each run is started, met by its fault, judged by how it ends, started again until it is finished, and then compared with
a run that nothing befell.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import psutil

from tests.commands import import_path
from tests.faults.base import begun_at, differences
from tests.faults.campaign import Verdict
from tests.tiny_run import make_corpus

REPOSITORY = pathlib.Path(__file__).parents[2]
NUM_STEPS = 600
LIMIT_SECS = 240  # for whatever a run is waited for


class Wrong(Exception):
    """What a run did that it must not; the first argument is the outcome for the table."""


def logged_step(workdir: pathlib.Path) -> int:
    """The last one of which a run has written a record; -1: none."""
    try:
        lines = (workdir / "log.jsonl").read_bytes().split(b"\n")
        return json.loads(lines[-2])["step"]
    except (OSError, IndexError, ValueError, KeyError, TypeError):
        return -1


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """Of the finished checkpoints."""
    folder = workdir / "checkpoints"
    names = [path.parent.name for path in folder.glob("*/manifest.json")] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def damage_newest(workdir: pathlib.Path, rng: random.Random) -> tuple[pathlib.Path, int]:
    """Changes a bit of the newest checkpoint; the file, and how many steps the one before is older."""
    *_, before, last = saved_steps(workdir)
    newest = workdir / "checkpoints" / str(last)
    files = sorted(path for path in (newest / "params").rglob("*") if path.is_file() and path.stat().st_size)
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return path, last - before


@dataclasses.dataclass
class LiveRun:
    """A run under way."""

    corpus: pathlib.Path
    workdir: pathlib.Path
    rng: random.Random
    num_workers: int = 0
    num_steps: int = NUM_STEPS
    process: subprocess.Popen | None = None
    repair: Callable[[], object] = lambda: None  # what the user does before the next start
    may_lose: int = 0  # steps: where the fault itself takes the newest checkpoint away
    takes_log: bool = False  # the fault itself takes records of the log away

    def start(self) -> None:
        """Starts the command in a process group of its own."""
        command = [sys.executable, REPOSITORY / "train.py", f"--config={pathlib.Path(__file__).parent / 'config.py'}"]
        command += [f"--workdir={self.workdir}", f"--config.data.path={self.corpus}"]
        command += [f"--config.data.num_workers={self.num_workers}", f"--config.training.num_steps={self.num_steps}"]
        self.process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,  # not a file, whose size a fault may limit
            text=True,
            errors="replace",
            start_new_session=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": import_path()},
        )
        self._lines: list[str] = []
        self._listener = threading.Thread(target=lambda: self._lines.extend(self.process.stderr), daemon=True)
        self._listener.start()

    def end(self) -> tuple[int, str]:
        """Waits for the process; its exit code, and what it said.

        Raises:
          Wrong: if it does not end, shows a traceback or leaves processes behind.
        """
        children = self.children()
        try:
            code = self.process.wait(LIMIT_SECS)
        except subprocess.TimeoutExpired:
            raise Wrong("hung", f"no end in {LIMIT_SECS} s") from None
        finally:
            self.kill_group()
            self._listener.join(10)
            said = "".join(self._lines)
        if "Traceback" in said:
            raise Wrong("traceback", said[said.index("Traceback") :][-1500:])
        _, alive = psutil.wait_procs(children, timeout=10)
        if alive:
            for child in alive:
                child.kill()
            raise Wrong("processes left", ", ".join(child.name() for child in alive))
        return code, said

    def kill_group(self) -> None:
        """Ends what the command started, if the command itself has ended or does not."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        start = time.monotonic()
        while not condition():
            if self.process.poll() is not None or time.monotonic() - start > LIMIT_SECS:
                raise Wrong("fault not injected", f"the run ended, or went on too long, before {what}")
            time.sleep(0.002)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: self.logged_step() >= step, f"step {step}")

    def wait_somewhere(self) -> int:
        """Waits for a step drawn at random; returns it."""
        last = self.num_steps // 5 if self.num_workers else self.num_steps - 40  # processes read slowly
        step = self.rng.randrange(5, last)
        self.wait_for_step(step)
        time.sleep(self.rng.random() * 0.05)
        return step

    def logged_step(self) -> int:
        return logged_step(self.workdir)

    def saved_step(self) -> int:
        """Of the newest finished checkpoint; 0: there is none."""
        return max(saved_steps(self.workdir), default=0)

    def readers(self) -> list[psutil.Process]:
        found = []
        for child in self.children():
            with contextlib.suppress(psutil.NoSuchProcess):  # validation's come and go
                if "spawn_main" in " ".join(child.cmdline()):
                    found.append(child)
        return found

    def signal(self, number: int, *, group: bool = False) -> None:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.process.pid, number)


@dataclasses.dataclass(frozen=True)
class LiveKind:
    """A kind of fault: what it does to a run under way, and the exit codes that it may then have."""

    name: str
    inject: Callable[[LiveRun], str]
    times: int
    exit_codes: frozenset[int]
    num_workers: int = 0


LIVE_KINDS: list[LiveKind] = []


def live(times: int, *exit_codes: int, num_workers: int = 0):
    """Enters a function into `LIVE_KINDS`. It starts the run, and leaves it to end."""

    def enter(inject: Callable[[LiveRun], str]) -> Callable[[LiveRun], str]:
        name = inject.__name__.replace("_", " ")
        LIVE_KINDS.append(LiveKind(name, inject, times, frozenset(exit_codes), num_workers))
        return inject

    return enter


@live(12, -signal.SIGKILL)
def killed_at_any_step(run: LiveRun) -> str:
    run.start()
    step = run.wait_somewhere()
    run.signal(signal.SIGKILL)
    return f"after step {step}"


@live(8, -signal.SIGKILL)
def killed_while_it_saves(run: LiveRun) -> str:
    run.start()
    after = run.rng.randrange(0, run.num_steps - 60, 30)
    run.wait_for_step(after)
    folder = run.workdir / "checkpoints"
    run.wait_until(
        lambda: folder.is_dir() and any(not (path / "manifest.json").exists() for path in folder.iterdir()), "a save"
    )
    time.sleep(run.rng.random() * 0.02)
    run.signal(signal.SIGKILL)
    return f"in the save after step {after}"


@live(6, -signal.SIGKILL)
def killed_while_it_starts(run: LiveRun) -> str:
    run.start()
    secs = run.rng.random() * 6
    time.sleep(secs)
    run.signal(signal.SIGKILL)
    return f"after {secs:.2f} s"


@live(6, 75)
def terminated_at_any_step(run: LiveRun) -> str:
    run.start()
    step = run.wait_somewhere()
    run.signal(signal.SIGTERM)
    return f"after step {step}"


@live(6, 75)
def interrupted_with_its_group(run: LiveRun) -> str:
    run.start()
    step = run.wait_somewhere()
    run.signal(signal.SIGINT, group=True)
    return f"after step {step}"


@live(6, 75)
def two_signals_at_once(run: LiveRun) -> str:
    run.start()
    step = run.wait_somewhere()
    first, second = (run.rng.choice([signal.SIGINT, signal.SIGTERM]) for _ in range(2))
    run.signal(first)
    time.sleep(0.05)
    run.signal(second)
    return f"after step {step}: {first.name}, {second.name}"


@live(8, 75)
def signal_while_it_starts(run: LiveRun) -> str:
    """From the moment on at which Python, which has its own ways, has come to this project's code."""
    run.start()
    secs = 0.5 + run.rng.random() * 7
    time.sleep(secs)
    number = run.rng.choice([signal.SIGINT, signal.SIGTERM])
    run.signal(number, group=run.rng.random() < 0.5)
    return f"{number.name} after {secs:.2f} s"


@live(6, 75, num_workers=2)
def signal_to_a_run_with_readers_and_its_group(run: LiveRun) -> str:
    run.start()
    step = run.wait_somewhere()
    if (num_readers := len(run.readers())) < run.num_workers:
        raise Wrong("fault not injected", f"{num_readers} reader processes were found")
    number = run.rng.choice([signal.SIGINT, signal.SIGTERM])
    run.signal(number, group=True)
    return f"{number.name} after step {step}"


@live(4, 75, num_workers=4)
def signal_to_a_run_with_four_readers_and_its_group(run: LiveRun) -> str:
    return signal_to_a_run_with_readers_and_its_group(run)


@live(4, -signal.SIGKILL, num_workers=2)
def killed_with_readers(run: LiveRun) -> str:
    run.start()
    step = run.wait_somewhere()
    run.signal(signal.SIGKILL)
    return f"after step {step}"


@live(5, 1, num_workers=2)
def a_reader_killed(run: LiveRun) -> str:
    run.start()
    step = run.wait_somewhere()
    if not (readers := run.readers()):
        raise Wrong("fault not injected", "no reader process was found")
    run.rng.choice(readers).kill()
    return f"after step {step}"


@live(6, 0)
def started_a_second_time(run: LiveRun) -> str:
    run.start()
    step = run.wait_somewhere()
    second = dataclasses.replace(run)
    run.signal(signal.SIGSTOP)  # so that it is not finished before the second one has started
    before = run.saved_step()
    second.start()
    code, said = second.end()
    run.signal(signal.SIGCONT)
    if code != 2 or "error:" not in said:
        raise Wrong("two owners", f"the second start ended with {code}: {said[-500:]}")
    if run.saved_step() < before:
        raise Wrong("lost", "a checkpoint was removed by the second start")
    return f"after step {step}"


@live(6, 1, 0)
def no_room_for_files(run: LiveRun) -> str:
    """The limit of a file's size stands for a full disk, which needs rights to make."""
    run.start()
    step = run.wait_somewhere()
    limit = run.rng.choice([0, 200, 4096])
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    return f"after step {step}: {limit} bytes a file"


@live(4, 1, 2, 0)
def tokens_overwritten_while_they_are_read(run: LiveRun) -> str:
    run.start()
    step = run.wait_somewhere()
    path = run.corpus / run.rng.choice(["train.bin", "validation.bin"])
    good = path.read_bytes()
    run.repair = lambda: path.write_bytes(good)
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(bytes([3, 0]) * ((len(good) - 8192) // 2))
    return f"{path.name} after step {step}"


@live(4, 0, 75)
def log_damaged_while_it_is_written(run: LiveRun) -> str:
    run.start()
    step = run.wait_somewhere()
    with (run.workdir / "log.jsonl").open("ab") as file:
        file.write(run.rng.choice([b"\n", b"{\n", b"\0" * 9 + b"\n", b"torn"]))  # the last takes the next record along
    run.takes_log = True
    run.signal(signal.SIGTERM)
    return f"after step {step}"


@live(4, 1, -signal.SIGKILL, 75, 0)
def newest_checkpoint_damaged_and_killed(run: LiveRun) -> str:
    run.start()
    run.wait_for_step(run.rng.randrange(100, run.num_steps - 60))
    run.signal(signal.SIGKILL)
    run.process.wait()
    path, run.may_lose = damage_newest(run.workdir, run.rng)
    return str(path.relative_to(run.workdir))


def judge_live(reference: pathlib.Path, kind: LiveKind, seed: int, num_steps: int = NUM_STEPS) -> Verdict:
    """Meets a run with a fault, ends it, starts it again until it is finished, and compares."""
    rng, start = random.Random(f"{kind.name} {seed}"), time.monotonic()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="fault-"))
    shutil.copytree(reference.parent / "data/corpus", folder / "corpus")
    run = LiveRun(folder / "corpus", folder / "run", rng, kind.num_workers, num_steps)
    done = ""
    try:
        done = kind.inject(run)
        before = run.saved_step()
        outcome, detail = _see_through(run, kind, before, reference)
    except Wrong as wrong:
        outcome, detail = wrong.args
    finally:
        run.kill_group()
        shutil.rmtree(folder, ignore_errors=True)
    return Verdict(kind.name, seed, done, outcome, detail, time.monotonic() - start, live=True)


def judge_named(folder: pathlib.Path, name: str, seed: int) -> Verdict:
    """`judge_live` by the folder of `make_reference` and the kind's name: for a process of its own."""
    return judge_live(folder / "whole", next(kind for kind in LIVE_KINDS if kind.name == name), seed)


def _see_through(run: LiveRun, kind: LiveKind, saved_before: int, reference: pathlib.Path) -> tuple[str, str]:
    code, said = run.end()
    if code not in kind.exit_codes and not (code == 0 and run.saved_step() == run.num_steps):
        return f"ended with {code}", said[-1500:]
    if code in (1, 2) and not re.search(r"^error: ", said, re.MULTILINE):
        return "no message", said[-500:]
    if wrong := _unsaved(run, code, said):
        return "not saved", wrong
    saved = max(saved_before, run.saved_step()) - run.may_lose
    run.repair()
    run.num_workers = 0  # which changes no batch
    for _ in range(3):
        run.start()
        code, said = run.end()
        begun = begun_at(said)
        if begun is None and code == 0:
            return "no message", f"a start does not say at which step it begins: {said[-1000:]}"
        if begun is not None and begun < saved:
            return "lost", f"step {saved} was saved, the next start began at {begun}"
        if code == 0:
            break
        saved = max(saved, run.saved_step())
    else:
        return "never finished", said[-1500:]
    wrong = differences(run.workdir, reference, logged_from=run.num_steps if run.takes_log else 0)
    return ("finished", "") if wrong is None else ("diverged", wrong)


def _unsaved(run: LiveRun, code: int, said: str) -> str | None:
    """How the step that an ended run says is saved differs from what is there; None: it does not."""
    saved, logged = run.saved_step(), run.logged_step()
    if code == 1:
        kept = re.search(r"\bstep (\d+) is saved", said)
        return f"it says step {kept[1]}, and {saved} is saved" if kept and int(kept[1]) != saved else None
    if code != 75:
        return None
    ended = re.search(r"^interrupted after step (\d+)", said, re.MULTILINE)
    if ended is None and "nothing is lost" not in said:
        return f"it does not say what is saved: {said[-500:]}"
    if ended is not None and int(ended[1]) != saved:
        return f"it was interrupted after step {ended[1]}, and {saved} is saved"
    return f"step {logged} was done, and {saved} is saved" if saved < logged else None


def make_reference(folder: pathlib.Path, num_steps: int = NUM_STEPS) -> pathlib.Path:
    """The corpus, and a run that nothing befell; what is there already is used."""
    workdir = folder / "whole"
    if not (folder / "ready").is_file():
        make_corpus(folder / "data")
        run = LiveRun(folder / "data/corpus", workdir, random.Random(0), num_steps=num_steps)
        run.start()
        code, said = run.end()
        if code != 0:
            raise RuntimeError(f"the run to compare with ended with {code}:\n{said}")
        (folder / "ready").touch()
    return workdir
