"""Entry scripts as a user runs them."""

import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time

from absl import app, flags, logging

ROOT = pathlib.Path(__file__).parent.parent


def import_path() -> str:
    """PYTHONPATH of a process that is to import what this one can, wherever that is installed, and this project."""
    return os.pathsep.join([str(ROOT), *sys.path])


def ends(pid, within=20):
    """Whether a process that is no child of ours ends."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """Runs a script of the top level in a process of its own, on the CPU."""
    return subprocess.run(
        [sys.executable, ROOT / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        timeout=300,
    )


def call_script(name: str, *arguments: object) -> int:
    """Runs a script in this process, which spares a start; returns its exit code."""
    app.define_help_flags()  # once for all scripts: absl defines them once in a process
    known, verbosity = set(flags.FLAGS), logging.get_verbosity()
    before, sys.argv = sys.argv, [name, *map(str, arguments)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
        logging.set_verbosity(verbosity)
        for flag in known:
            flags.FLAGS[flag].unparse()  # --help given to one script is not given to the next
        for flag in set(flags.FLAGS) - known:  # the next script defines its own
            delattr(flags.FLAGS, flag)
    raise AssertionError(f"{name} ended without an exit code")
