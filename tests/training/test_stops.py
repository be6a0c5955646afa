"""Runs that something ends: what was done is saved, and the message says up to which step."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from rat_jax.checkpoints.store import load_model
from rat_jax.config import config_to_dict
from rat_jax.data import DataError
from rat_jax.data.pipeline import TrainData
from rat_jax.errors import RunStopped
from rat_jax.interrupts import INTERRUPTED
from rat_jax.training import NonFiniteError, loop, train
from rat_jax.training.metrics import MetricLog
from rat_jax.training.step import train_step
from tests.commands import import_path
from tests.tiny_run import tiny_config


def test_data_that_cannot_be_read(corpus, tmp_path, monkeypatch):
    """As an id outside the vocabulary in mid-run: not the code of a run that changed nothing."""
    following = TrainData.__next__

    def next_or_error(data):
        if data.state()["next_batch"] == 3:
            raise DataError("train.bin, record 7: id 99 is outside the vocabulary")
        return following(data)

    monkeypatch.setattr(TrainData, "__next__", next_or_error)
    with pytest.raises(RunStopped, match=r"record 7: id 99 .*; step 3 is saved, and the same command resumes"):
        train(tiny_config(corpus), tmp_path / "run")
    assert load_model(tmp_path / "run").step == 3
    assert issubclass(NonFiniteError, RunStopped)
    monkeypatch.undo()
    assert train(tiny_config(corpus), tmp_path / "run").finished


def test_a_log_that_cannot_be_written(corpus, tmp_path, monkeypatch):
    write = MetricLog.write

    def write_or_error(log, step, figures):
        if step == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "log.jsonl")
        write(log, step, figures)

    monkeypatch.setattr(MetricLog, "write", write_or_error)
    with pytest.raises(RunStopped, match=r"log\.jsonl: No space left on device; make room .*; step 4 is saved"):
        train(tiny_config(corpus), tmp_path / "run")
    assert load_model(tmp_path / "run").step == 4


def test_a_signal_before_the_first_step_of_a_start(corpus, tmp_path, monkeypatch):
    """In library use; there is nothing to save."""
    config = tiny_config(corpus)

    def signal_and_step(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*arguments)

    for _ in range(2):  # the second start resumes
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(loop, "train_step", signal_and_step)
            train(config, tmp_path / "run")
        with monkeypatch.context() as patch:
            steps = iter([train_step, signal_and_step])
            patch.setattr(loop, "train_step", lambda *arguments, steps=steps: next(steps)(*arguments))
            train(config, tmp_path / "run")
    assert load_model(tmp_path / "run").step == 4
    assert train(config, tmp_path / "run").finished


def test_a_reader_that_dies(corpus, tmp_path, monkeypatch):
    def kill_reader_and_step(*arguments):
        for reader in multiprocessing.active_children():
            os.kill(reader.pid, signal.SIGKILL)
        return train_step(*arguments)

    monkeypatch.setattr(loop, "train_step", kill_reader_and_step)
    with pytest.raises(RunStopped, match=r"a process that reads the data died: it was killed, .*; step \d+ is saved"):
        # More steps than the batches that are read ahead.
        changes = {"data__num_workers": 1, "training__num_steps": 20, "training__validate_every_steps": 20}
        train(tiny_config(corpus, **changes), tmp_path / "run")
    assert load_model(tmp_path / "run").step >= 1
    assert not multiprocessing.active_children()


PROGRAM = """
import json, sys
from rat_jax import interrupts, program

def main():
    from rat_jax.config import config_from_dict
    from rat_jax.training import train
    finished = train(config_from_dict(json.loads(sys.argv[1])), sys.argv[2]).finished
    return 0 if finished else program.INTERRUPTED

if __name__ == "__main__":
    with interrupts.of_program():
        code = program.exit_code(main)
    sys.exit(code)
"""


@pytest.mark.slow
def test_signals_to_the_whole_group_while_validation_starts_its_readers(corpus, tmp_path):
    config = tiny_config(corpus, data__num_workers=1, training__num_steps=10**6, training__checkpoint_every_steps=100)
    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "program.py", json.dumps(config_to_dict(config)), tmp_path / "run"],
        env=os.environ | {"PYTHONPATH": import_path()},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log = tmp_path / "run/log.jsonl"
    while not (log.is_file() and '"step": 4' in log.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    for _ in range(2):  # within the seconds that a reader takes to start
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
    said = process.communicate()[1]
    assert process.returncode == INTERRUPTED, said
    assert "Traceback" not in said
    assert load_model(tmp_path / "run").step == 4
    until = time.monotonic() + 20  # readers are waited for; multiprocessing's own helper ends a little later
    while is_there(process.pid):
        assert time.monotonic() < until
        time.sleep(0.05)


def is_there(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
