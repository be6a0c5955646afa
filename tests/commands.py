"""Entry scripts as a user runs them."""

import os
import pathlib
import runpy
import subprocess
import sys

from absl import flags, logging

ROOT = pathlib.Path(__file__).parent.parent


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """Runs a script of the top level in a process of its own, on the CPU."""
    return subprocess.run(
        [sys.executable, ROOT / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        timeout=300,
    )


def call_script(name: str, *arguments: object) -> int | str:
    """Calls the `main` of a script in this process, which spares a start; returns what it exits with, 0 at its end."""
    known, verbosity = set(flags.FLAGS), logging.get_verbosity()
    words = [name, *map(str, arguments)]
    before, sys.argv = sys.argv, words  # where fields of a config are looked for
    try:
        main = runpy.run_path(str(ROOT / name))["main"]
        main(words if name == "train.py" else flags.FLAGS(words))  # train.py reads its flags itself
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
        logging.set_verbosity(verbosity)
        for flag in set(flags.FLAGS) - known:  # the next script defines its own
            delattr(flags.FLAGS, flag)
    return 0
