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


def mend_interpreter() -> None:
    """Makes it run, in such a process, with numpy 2.4, and a fifth faster.

    Triton 3.6 reads loop bounds as int(array of shape [1]), which numpy 2.4 refuses; triton 3.7 squeezes them.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_squeeze(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_and_squeeze

    # Patching looks through all of the language. The kernel has done so when it calls a function: once for each module
    # of such functions, which may know the language under another name, is enough.
    modules = set()

    def patch_once_and_call(function, *args, **kwargs):
        if function.fn.__module__ not in modules:
            modules.add(function.fn.__module__)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = patch_once_and_call
