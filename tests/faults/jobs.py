"""Faults that meet one process of a job of two, or the whole job, at a moment drawn from a seed.

Each job is started, met by its fault, judged by how its processes end, started again until it is finished, and then
compared with a job that nothing befell.
"""

import contextlib
import dataclasses
import pathlib
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable

from rat_jax.config import Config
from rat_jax.interrupts import INTERRUPTED
from rat_jax.program import LOST
from tests.cluster.job import job, said, smallest_config
from tests.faults.base import begun_at, differences, figures
from tests.faults.campaign import Verdict
from tests.faults.live import LIMIT_SECS, Wrong, damage_newest, logged_step, saved_steps
from tests.tiny_run import make_corpus

NUM_STEPS, SAVE_EVERY = 60, 4
FLAGS = ("--lost_after_secs=20", "--start_timeout_secs=40")
KILLED = -signal.SIGKILL
LARGEST_DIFFERENCE = 1e-5  # of figures of other numbers of processes, which add in another order


@dataclasses.dataclass
class Job:
    """A job under way, and what is done with it next."""

    folder: pathlib.Path
    corpus: pathlib.Path
    rng: random.Random
    stack: contextlib.ExitStack
    processes: list[subprocess.Popen] = dataclasses.field(default_factory=list)
    next_processes: int = 2  # that the job is started again with
    may_lose: int = 0  # steps: where the fault itself takes the newest checkpoint away

    @property
    def workdir(self) -> pathlib.Path:
        return self.folder / "run"

    def config(self, num_processes: int) -> Config:
        return smallest_config(
            self.corpus,
            mesh__fsdp=num_processes,
            training__num_steps=NUM_STEPS,
            training__validate_every_steps=NUM_STEPS,
            training__checkpoint_every_steps=SAVE_EVERY,
        )

    def start(self, num_processes: int = 2) -> None:
        """Starts processes of one device each."""
        processes = job(self.folder, self.config(num_processes), *FLAGS, num_processes=num_processes, devices=1)
        self.processes = self.stack.enter_context(processes)

    def victim(self) -> int:
        return self.rng.randrange(2)

    def signal(self, number: int, what: signal.Signals) -> None:
        self.processes[number].send_signal(what)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        start = time.monotonic()
        while not condition():
            if any(process.poll() is not None for process in self.processes) or time.monotonic() - start > LIMIT_SECS:
                raise Wrong("fault not injected", f"the job ended, or went on too long, before {what}")
            time.sleep(0.002)

    def wait_somewhere(self) -> int:
        """Waits for a step drawn at random; returns it."""
        step = self.rng.randrange(2, NUM_STEPS - 20)
        self.wait_until(lambda: logged_step(self.workdir) >= step, f"step {step}")
        time.sleep(self.rng.random() * 0.05)
        return step

    def wait_for_save(self) -> int:
        """Waits until a save is under way that comes after a step drawn at random; returns the step."""
        after, folder = self.wait_somewhere(), self.workdir / "checkpoints"
        self.wait_until(
            lambda: folder.is_dir() and any(not (path / "manifest.json").exists() for path in folder.iterdir()),
            "a save",
        )
        time.sleep(self.rng.random() * 0.02)
        return after

    def end(self, *numbers: int) -> list[int]:
        """Waits for processes, all if none is named; their exit codes.

        Raises:
          Wrong: if one does not end or shows a traceback.
        """
        codes = []
        for number in numbers or range(len(self.processes)):
            try:
                codes.append(self.processes[number].wait(LIMIT_SECS))
            except subprocess.TimeoutExpired:
                raise Wrong("hung", f"process {number} did not end in {LIMIT_SECS} s: {self.said(number)}") from None
            if "Traceback" in self.said(number):
                raise Wrong("traceback", self.said(number)[-3000:])
        return codes

    def said(self, number: int) -> str:
        return said(self.folder, number)


@dataclasses.dataclass(frozen=True)
class JobKind:
    """A kind of fault: what it does to a job under way, which it leaves to end, and what its processes may end with."""

    name: str
    inject: Callable[[Job], str]
    times: int
    codes: tuple[tuple[int, int], ...]  # in the order of their sizes


JOB_KINDS: list[JobKind] = []


def of_a_job(times: int, *codes: tuple[int, int]):
    """Enters a function into `JOB_KINDS`. It starts the job."""

    def enter(inject: Callable[[Job], str]) -> Callable[[Job], str]:
        JOB_KINDS.append(JobKind(inject.__name__.replace("_", " "), inject, times, codes))
        return inject

    return enter


@of_a_job(3, (KILLED, LOST))
def a_process_of_a_job_killed_at_any_step(run: Job) -> str:
    run.start()
    step, victim = run.wait_somewhere(), run.victim()
    run.signal(victim, signal.SIGKILL)
    return f"process {victim} after step {step}"


@of_a_job(3, (KILLED, LOST))
def a_process_of_a_job_killed_while_it_saves(run: Job) -> str:
    run.start()
    step, victim = run.wait_for_save(), run.victim()
    run.signal(victim, signal.SIGKILL)
    return f"process {victim} in the save after step {step}"


@of_a_job(3, (KILLED, LOST))
def a_process_of_a_job_killed_while_it_starts(run: Job) -> str:
    run.start()
    secs, victim = run.rng.random() * 8, run.victim()
    time.sleep(secs)
    run.signal(victim, signal.SIGKILL)
    return f"process {victim} after {secs:.2f} s"


@of_a_job(2, (KILLED, KILLED))
def a_job_killed_and_continued_by_one_process(run: Job) -> str:
    run.start()
    step = run.wait_for_save() if run.rng.random() < 0.5 else run.wait_somewhere()
    for number in range(2):
        run.signal(number, signal.SIGKILL)
    run.next_processes = 1
    return f"after step {step}"


@of_a_job(2, (INTERRUPTED, INTERRUPTED))
def a_signal_to_one_process_of_a_job(run: Job) -> str:
    run.start()
    step, victim, number = run.wait_somewhere(), run.victim(), run.rng.choice([signal.SIGINT, signal.SIGTERM])
    run.signal(victim, number)
    return f"{number.name} to process {victim} after step {step}"


@of_a_job(2, (INTERRUPTED, INTERRUPTED), (INTERRUPTED, LOST))
def a_signal_to_one_process_of_a_job_that_starts(run: Job) -> str:
    """From the moment on at which all have met: imports are Python's own time, and that of what holds a process."""
    run.start()
    secs, victim, number = run.rng.random() * 4, run.victim(), run.rng.choice([signal.SIGINT, signal.SIGTERM])
    run.wait_until(lambda: "devices " in run.said(0), "the meeting")
    time.sleep(secs)
    run.signal(victim, number)
    return f"{number.name} to process {victim}, {secs:.2f} s after they have met"


@of_a_job(2, (LOST, LOST))
def a_process_of_a_job_stopped_and_woken_later(run: Job) -> str:
    """It sleeps when the other has ended. It holds the workdir if it is the first, and may write nothing any more."""
    run.start()
    step, victim = run.wait_somewhere(), run.victim()
    run.signal(victim, signal.SIGSTOP)
    run.end(1 - victim)
    asleep, others = run.processes[victim], run.said(1 - victim)
    if f"process {victim} is lost" not in others:
        raise Wrong("no message", others[-1500:])
    before = _contents(run.workdir)
    asleep.send_signal(signal.SIGCONT)
    run.end(victim)
    if changed := [path for path, content in _contents(run.workdir).items() if before.get(path, content) != content]:
        raise Wrong("written later", f"by process {victim}: {changed}")
    return f"process {victim} after step {step}"


@of_a_job(2, (KILLED, LOST))
def newest_checkpoint_of_a_job_damaged(run: Job) -> str:
    """A part that one of the processes wrote."""
    run.start()
    run.wait_until(lambda: len(saved_steps(run.workdir)) > 1, "two saves")
    victim = run.victim()
    run.signal(victim, signal.SIGKILL)
    run.end()
    path, run.may_lose = damage_newest(run.workdir, run.rng)
    return str(path.relative_to(run.workdir))


def _contents(workdir: pathlib.Path) -> dict[pathlib.Path, bytes]:
    """Checkpoints and log."""
    files = [workdir / "log.jsonl", *sorted((workdir / "checkpoints").rglob("*"))]
    return {path: path.read_bytes() for path in files if path.is_file()}


def judge_job(reference: pathlib.Path, kind: JobKind, seed: int) -> Verdict:
    """Meets a job with a fault, waits for its end, starts it again until it is finished, and compares."""
    start, folder, done = time.monotonic(), pathlib.Path(tempfile.mkdtemp(prefix="fault-")), ""
    try:
        with contextlib.ExitStack() as stack:
            run = Job(folder, _corpus_of(reference), random.Random(f"{kind.name} {seed}"), stack)
            done = kind.inject(run)
            outcome, detail = _see_through(run, kind, reference)
    except Wrong as wrong:
        outcome, detail = wrong.args
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Verdict(kind.name, seed, done, outcome, detail, time.monotonic() - start, live=True)


def judge_named(folder: pathlib.Path, name: str, seed: int) -> Verdict:
    """`judge_job` by the folder of `make_reference` and the kind's name: for a process of its own."""
    return judge_job(folder / "run", next(kind for kind in JOB_KINDS if kind.name == name), seed)


def _see_through(run: Job, kind: JobKind, reference: pathlib.Path) -> tuple[str, str]:
    codes = run.end()
    texts = [run.said(number) for number in range(len(codes))]
    finished = all(code == 0 for code in codes) and saved_steps(run.workdir)[-1:] == [NUM_STEPS]
    if tuple(sorted(codes)) not in kind.codes and not finished:
        return f"ended with {codes}", "\n".join(text[-1500:] for text in texts)
    for code, text in zip(codes, texts, strict=True):
        if code == LOST and not re.search(r"^error: ", text, re.MULTILINE):
            return "no message", text[-1500:]
    saved = max(saved_steps(run.workdir), default=0) - run.may_lose
    for code, text in zip(codes, texts, strict=True):
        ended = re.search(r"^interrupted after step (\d+)", text, re.MULTILINE)
        if code == INTERRUPTED and ended is None and "nothing is lost" not in text:
            return "not saved", f"it does not say what is saved: {text[-1500:]}"
        if ended is not None and int(ended[1]) != saved:
            return "not saved", f"it was interrupted after step {ended[1]}, and {saved} is saved"
    for _ in range(2):
        run.start(run.next_processes)
        codes = run.end()
        text = run.said(0)
        begun = begun_at(text)
        if begun is None or begun < saved:
            return "lost", f"step {saved} was saved, the next start began at {begun}: {text[-1500:]}"
        if set(codes) == {0}:
            break
        saved = max(saved_steps(run.workdir))
    else:
        return "never finished", f"{codes}: {text[-1500:]}"
    if run.next_processes == 2:
        wrong = differences(run.workdir, reference)
    else:
        wrong = _large_differences(run.workdir, reference)
    return ("finished", "") if wrong is None else ("diverged", wrong)


def _large_differences(workdir: pathlib.Path, other: pathlib.Path) -> str | None:
    """How logged figures differ from another's by more than the order of additions makes; None: they do not."""
    left, right = figures(workdir), figures(other)
    missing = left.keys() ^ right.keys()
    far = [key for key in left.keys() & right.keys() if abs(left[key] - right[key]) > LARGEST_DIFFERENCE * right[key]]
    return f"the log has other figures: {sorted(missing)[:3]}, {sorted(far)[:3]}" if missing or far else None


def _corpus_of(reference: pathlib.Path) -> pathlib.Path:
    return reference.parent / "data/corpus"


def make_reference(folder: pathlib.Path) -> pathlib.Path:
    """The corpus, and a job that nothing befell; what is there already is used."""
    workdir = folder / "run"
    if not (folder / "ready").is_file():
        make_corpus(folder / "data")
        with contextlib.ExitStack() as stack:
            run = Job(folder, _corpus_of(workdir), random.Random(0), stack)
            run.start()
            codes = run.end()
        if codes != [0, 0]:
            raise RuntimeError(f"the job to compare with ended with {codes}:\n{run.said(0)}")
        (folder / "ready").touch()
    return workdir
