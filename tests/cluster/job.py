"""Jobs of several processes of this machine, each with two virtual devices, with a model as small as can be."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Iterator

from rat_jax.config import Config
from tests.commands import ROOT
from tests.tiny_run import tiny_config, train_command

WAIT_SECS = 300.0  # for what a machine with other work does


def smallest_config(corpus: pathlib.Path, **changes: object) -> Config:
    """A model of one layer, on all devices, that logs and saves often."""
    settings = {
        "mesh__fsdp": 2,
        "mesh__data": -1,
        "model__num_layers": 1,
        "model__pattern": ("rat",),
        "training__num_steps": 12,
        "training__validate_every_steps": 12,
        "training__checkpoint_every_steps": 2,
    }
    return tiny_config(corpus, **settings | changes)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def job(
    folder: pathlib.Path,
    config: Config,
    *flags: str,
    num_processes: int = 2,
    devices: int = 2,
    hold: dict[int, int] | None = None,
    each: dict[int, list[str]] | None = None,
) -> Iterator[list[subprocess.Popen]]:
    """The processes of a job that trains in `folder`/run; what still runs at the end of the block is killed.

    Args:
      folder: of the config file and the workdir.
      config: of the run.
      flags: further ones of all.
      num_processes: 1 gives no flags of a job.
      devices: of each process.
      hold: by process, the step before which it waits for ever.
      each: by process, further flags of it alone.
    """
    _, _, *arguments = train_command(folder, config)
    command = ["-m", "tests.cluster.held_train", *arguments, *flags]
    variables = {number: {"HOLD_AT": str(step)} for number, step in (hold or {}).items()}
    sizes = {"num_processes": num_processes, "devices": devices}
    with started(folder, *command, **sizes, each=each, variables=variables) as processes:
        yield processes


@contextlib.contextmanager
def started(
    folder: pathlib.Path,
    *command: str,
    num_processes: int = 2,
    devices: int = 2,
    each: dict[int, list[str]] | None = None,
    variables: dict[int, dict[str, str]] | None = None,
) -> Iterator[list[subprocess.Popen]]:
    """The processes of a job; what still runs at the end of the block is killed.

    Args:
      folder: of what they say.
      command: of Python: a script or a module with flags of all.
      num_processes: 1 gives no flags of a job.
      devices: of each process.
      each: by process, further flags of it alone.
      variables: by process, of its environment.
    """
    address = f"localhost:{free_port()}"
    processes = []
    try:
        for number in range(num_processes):
            place = [f"--coordinator_address={address}", f"--num_processes={num_processes}", f"--process_id={number}"]
            python = {}
            if sys.dont_write_bytecode:  # Python keeps what it has read of sources for the next process all the same
                python = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
            xla = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
            environment = python | {"XLA_FLAGS": xla, "JAX_PLATFORMS": "cpu"} | (variables or {}).get(number, {})
            of_job = place if num_processes > 1 else ()
            processes.append(
                subprocess.Popen(
                    [sys.executable, *command, *(each or {}).get(number, ()), *of_job],
                    cwd=ROOT,
                    env=os.environ | environment,
                    stdout=(folder / f"printed-{number}.txt").open("w"),
                    stderr=(folder / f"said-{number}.txt").open("w"),
                    text=True,
                )
            )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def codes_of(processes: list[subprocess.Popen]) -> list[int]:
    """The exit codes of all, as soon as they have ended."""
    return [process.wait(timeout=WAIT_SECS) for process in processes]


def printed(folder: pathlib.Path, number: int) -> str:
    """What a process of the last job has printed so far."""
    return (folder / f"printed-{number}.txt").read_text()


def said(folder: pathlib.Path, number: int) -> str:
    """What a process of the last job has said so far."""
    return (folder / f"said-{number}.txt").read_text()
