"""Programs of tests that see several CPU devices: the number is fixed when JAX starts, hence a process for each."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

_REPOSITORY = pathlib.Path(__file__).parents[1]


def run(program: str, *arguments: str, count: int = 4) -> Any:
    """What a module prints as JSON."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", program, *arguments]
    done = subprocess.run(command, cwd=_REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
