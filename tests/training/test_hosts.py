"""Two hosts, played by two processes of this machine: train.py --distributed finds the others as a Slurm job does."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import time

import pytest

from rat_jax.checkpoints.store import load_model
from rat_jax.interrupts import INTERRUPTED
from tests.tiny_run import tiny_config, train_command

ROOT = pathlib.Path(__file__).parents[2]
NEVER = 10**6


@pytest.fixture
def command(corpus, tmp_path):
    config = tiny_config(
        corpus,
        mesh__data=2,
        training__num_steps=NEVER,
        training__validate_every_steps=NEVER,
        training__checkpoint_every_steps=NEVER,
    )
    return [*train_command(tmp_path, config), "--distributed"]


def start(command):
    """The two processes of a job."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    job = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | job | {"SLURM_PROCID": str(index), "JAX_COORDINATOR_PORT": str(port)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


def wait_for_step(log, step, hosts):
    until = time.monotonic() + 240
    while not (log.is_file() and any(json.loads(line)["step"] >= step for line in log.read_text().splitlines()[:-1])):
        assert [host.poll() for host in hosts] == [None, None], hosts[0].stderr.read() + hosts[1].stderr.read()
        assert time.monotonic() < until
        time.sleep(0.05)


def end(hosts, signalled):
    """Sends SIGTERM to some of the hosts; returns what they say until all have ended."""
    for index in signalled:
        hosts[index].send_signal(signal.SIGTERM)
    said = [host.communicate(timeout=240)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [INTERRUPTED, INTERRUPTED], said
    assert "Traceback" not in "".join(said)
    return said


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [(0,), (1,), (0, 1)], ids=["first", "second", "both"])
def test_a_signal_to_any_host_ends_all_after_a_step_that_is_saved(command, tmp_path, signalled):
    """jax's own watch over SIGTERM, which train.py switches off, would take the signal away."""
    log, saved = tmp_path / "run/log.jsonl", 0
    for _ in range(2 if signalled == (0, 1) else 1):  # the second start resumes
        hosts = start(command)
        try:
            wait_for_step(log, saved + 3, hosts)
            said = end(hosts, signalled)
        finally:
            for host in hosts:
                host.kill()
                host.wait()
        before, saved = saved, load_model(tmp_path / "run").step
        assert saved > before
        assert f"interrupted after step {saved}; the same command resumes there" in said[0]
        assert (f"checkpoints/{before}" in said[0]) == (before > 0)
        assert not (tmp_path / "run/owner.json").exists()
