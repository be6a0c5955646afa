"""Entry scripts as a user runs them."""

import os
import pathlib
import subprocess
import sys

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
