"""Jobs of processes of this machine: one that is lost ends the others, and the run goes on with any number.

What they have of `rat_jax.cluster` is in other files; here it is seen to work in train.py.
"""

import json
import signal
import subprocess
import sys
import time

import pytest

from rat_jax.checkpoints.store import load_model
from rat_jax.program import LOST
from rat_jax.training import train
from tests.cluster.job import WAIT_SECS, free_port, job, said, smallest_config
from tests.commands import ROOT
from tests.documented import PAGES, blocks
from tests.tiny_run import make_corpus, train_command


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


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("signal_number", [signal.SIGSTOP, None], ids=["stopped", "stuck"])
def test_a_process_that_does_nothing_ends_the_other_in_the_stated_time(corpus, tmp_path, number, signal_number):
    """One is stopped as a whole, or its main thread waits while its watch still gives signs of life."""
    config = smallest_config(corpus)
    text, secs = lose(tmp_path, config, number, 5, "--lost_after_secs=10", signal_number=signal_number)
    assert f"error: process {number} is lost: " in text
    assert secs < 30
    assert load_model(tmp_path / "run").step == 4


@pytest.mark.slow
def test_a_run_goes_on_with_more_processes(corpus, tmp_path):
    """1 x 1 devices are killed, 2 x 2 go on: the losses are those of 1 x 1, and both end well."""
    alone = smallest_config(corpus, mesh__fsdp=1)
    with job(tmp_path, alone, num_processes=1, devices=1, hold={0: 7}) as processes:
        wait_until_held(tmp_path, processes, 0, 6)
    with job(tmp_path, smallest_config(corpus)) as processes:
        codes = [process.wait(timeout=WAIT_SECS) for process in processes]
    assert codes == [0, 0], said(tmp_path, 0)
    assert f"resuming from {tmp_path / 'run/checkpoints/6'}" in said(tmp_path, 0)
    assert train(alone, tmp_path / "alone").finished
    found, wanted = losses(tmp_path / "run"), losses(tmp_path / "alone")
    assert set(found) == set(wanted)
    assert max(abs(found[key] - wanted[key]) for key in wanted) < 1e-5


@pytest.mark.slow
def test_one_whose_data_are_not_there_ends_all(corpus, tmp_path):
    """The second process alone refuses; the first, which waits for it, says whose output to read."""
    config = smallest_config(corpus)
    with job(tmp_path, config, each={1: ["--config.data.path=nowhere"]}) as processes:
        codes = [process.wait(timeout=WAIT_SECS) for process in processes]
    assert codes == [LOST, 2]
    assert "is not a prepared corpus" in said(tmp_path, 1)
    assert "error: process 1 has ended with code 2, see what it says" in said(tmp_path, 0)
    assert "Traceback" not in said(tmp_path, 0) + said(tmp_path, 1)


@pytest.mark.slow
def test_other_data_and_other_configs_are_refused_on_all(corpus, tmp_path):
    other = make_corpus(tmp_path / "other", num_ids=2100)
    with job(tmp_path, smallest_config(corpus), each={1: [f"--config.data.path={other}"]}) as processes:
        codes = [process.wait(timeout=WAIT_SECS) for process in processes]
    assert codes == [2, 2]
    for number in range(2):
        assert "error: the hosts have different data: " in said(tmp_path, number)
        assert "for process 1 and" in said(tmp_path, number)
    with job(tmp_path, smallest_config(corpus), each={1: ["--config.seed=5"]}) as processes:
        codes = [process.wait(timeout=WAIT_SECS) for process in processes]
    assert codes == [2, 2]
    for number in range(2):
        assert "differs from process 0: config.seed is 5 there, 0 here" in said(tmp_path, number)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_that_does_not_come_is_named(corpus, tmp_path):
    with job(tmp_path, smallest_config(corpus), "--start_timeout_secs=5") as processes:
        processes[1].kill()
        assert processes[0].wait(timeout=WAIT_SECS) == LOST
    assert "error: process 1 of 2 did not come to localhost:" in said(tmp_path, 0)
    assert "within 5 s; nothing was changed" in said(tmp_path, 0)
    with job(tmp_path, smallest_config(corpus), "--start_timeout_secs=5") as processes:
        processes[0].kill()
        assert processes[1].wait(timeout=WAIT_SECS) == LOST
    assert "error: process 0 was not reached at localhost:" in said(tmp_path, 1)


@pytest.mark.slow
def test_the_local_script_of_the_documentation_runs(corpus, tmp_path):
    config = smallest_config(corpus, mesh__fsdp=1, training__num_steps=2, training__validate_every_steps=2)
    train_command(tmp_path, config)
    (script,) = (block for page in PAGES for block in blocks(page, "sh") if "--process_id=$i" in block)
    for old, new in (
        ("configs/default.py", str(tmp_path / "config.py")),
        ("runs/two", str(tmp_path / "run")),
        (":8476", f":{free_port()}"),
    ):
        assert old in script
        script = script.replace(old, new)
    python = f'python() {{ "{sys.executable}" "$@"; }}'
    done = subprocess.run(
        ["bash", "-c", f"{python}\n{script}"], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_SECS
    )
    assert done.returncode == 0, done.stderr
    assert "devices     2 x cpu" in done.stderr
    assert load_model(tmp_path / "run").step == 2
