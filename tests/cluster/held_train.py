"""train.py whose process waits for ever before a step, HOLD_AT, so that a test can do something to it then.

It draws no curve, and its TensorBoard files do without PyTorch, which take as long as all else.
"""

import os
import runpy
import sys
import time

from rat_jax.training import loop
from rat_jax.training.metrics import MetricLog
from rat_jax.training.step import train_step
from tests.commands import ROOT

_HOLD_AT = int(os.environ.get("HOLD_AT", "0"))


def _step_or_wait(graphdef, optimizer, num_steps, state, *rest):
    if int(state.step) + 1 == _HOLD_AT:
        print(f"held before step {_HOLD_AT}", file=sys.stderr, flush=True)
        while True:
            time.sleep(60)
    return train_step(graphdef, optimizer, num_steps, state, *rest)


sys.modules["torch"] = None
loop.train_step = _step_or_wait
MetricLog.plot = lambda log: None
sys.argv[0] = "train.py"
runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
