"""Jobs of processes of this machine: one that is lost ends the others, and the run goes on with any number."""

import json
import signal
import time

import pytest

from rat_jax.checkpoints.store import load_model
from rat_jax.program import LOST
from rat_jax.training import train
from tests.cluster.job import WAIT_SECS, job, said, smallest_config
from tests.tiny_run import make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("data"))


def wait_until_held(folder, processes, number, saved):
    """Until a process waits and the last step that was due is saved, which a thread does."""
    until, manifest = time.monotonic() + WAIT_SECS, folder / f"run/checkpoints/{saved}/manifest.json"
    while "held before step" not in said(folder, number) or not manifest.exists():
        assert [process.poll() for process in processes] == [None] * len(processes), [
            said(folder, other)[-2000:] for other in range(len(processes))
        ]
        assert time.monotonic() < until
        time.sleep(0.05)


def lose(folder, config, number, step, *flags, signal_number=signal.SIGKILL):
    """Ends one of two processes when it is at a step, and waits for the other; what that says, and how long it took."""
    with job(folder, config, *flags, hold={number: step}) as processes:
        wait_until_held(folder, processes, number, step - 1)
        if signal_number is not None:
            processes[number].send_signal(signal_number)
        start = time.monotonic()
        code = processes[1 - number].wait(timeout=WAIT_SECS)
        secs = time.monotonic() - start
    assert code == LOST, said(folder, 1 - number)
    return said(folder, 1 - number), secs


def losses(workdir):
    """The last loss that was logged of each step, and of each validation."""
    lines = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    return {(line["step"], name): line[name] for line in lines for name in ("loss", "validation_loss") if name in line}


def test_two_processes_train_as_one_and_whatever_is_lost_resumes(corpus, tmp_path):
    """2 x 2 devices lose the second process, then the first, and 1 x 4 goes on: the losses are those of 1 x 1."""
    config, run = smallest_config(corpus), tmp_path / "run"
    text, secs = lose(tmp_path, config, 1, 5)
    assert "error: process 1 is lost: its connection was closed; " in text
    assert secs < 30
    assert load_model(run).step == 4

    (run / "checkpoints/5/params").mkdir(parents=True)  # which two processes that clean up would both move away
    (run / "checkpoints/6.orbax-checkpoint-tmp").mkdir()
    text, secs = lose(tmp_path, config, 0, 9)
    assert "error: process 0 is lost: its connection was closed; " in text
    assert secs < 30
    assert load_model(run).step == 8
    assert (run / "checkpoints/unfinished-5").is_dir()

    with job(tmp_path, config, num_processes=1, devices=4) as (process,):
        assert process.wait(timeout=WAIT_SECS) == 0, said(tmp_path, 0)
    assert f"resuming from {run / 'checkpoints/8'}" in said(tmp_path, 0)

    alone = tmp_path / "alone"
    assert train(smallest_config(corpus, mesh__fsdp=1), alone).finished
    found, wanted = losses(run), losses(alone)
    assert set(found) == set(wanted) and len(wanted) == 13
    assert max(abs(found[key] - wanted[key]) for key in wanted) < 1e-5
