"""Jobs of several processes of this machine, each with two virtual devices, that train a model as small as can be."""

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
    address = f"localhost:{free_port()}"
    processes = []
    try:
        for number in range(num_processes):
            place = [f"--coordinator_address={address}", f"--num_processes={num_processes}", f"--process_id={number}"]
            python = {}
            if sys.dont_write_bytecode:  # Python keeps what it has read of sources for the next process all the same
                python = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
            xla = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
            processes.append(
                subprocess.Popen(
                    [
                        *(sys.executable, "-m", "tests.cluster.held_train"),
                        *(*arguments, *flags, *(each or {}).get(number, ()), *(place if num_processes > 1 else ())),
                    ],
                    cwd=ROOT,
                    env=os.environ | python | {"XLA_FLAGS": xla, "HOLD_AT": str((hold or {}).get(number, 0))},
                    stderr=(folder / f"said-{number}.txt").open("w"),
                    text=True,
                )
            )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def said(folder: pathlib.Path, number: int) -> str:
    """What a process of the last job has said so far."""
    return (folder / f"said-{number}.txt").read_text()
