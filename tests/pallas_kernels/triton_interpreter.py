"""Triton's interpreter: a switch of the whole process, hence a process for every program that needs it."""

import json
import os
import subprocess
import sys
from pathlib import Path


def errors_of(program: str, cases: list[str]) -> dict[str, dict[str, float]]:
    """What a module that prints a line of JSON for each named case finds, by case, when kernels are interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", program, *cases],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line.pop("case"): line for line in lines}
