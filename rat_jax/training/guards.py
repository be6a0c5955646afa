"""Bad batches: losses and gradients that are no finite numbers, and losses far above those before them.

What `train_step` skips is decided on the device, from its own figures and the limit of `Guard.max_loss`. The host
learns of it when it sees the figures, one step late, and counts, writes down and, if need be, ends the run. All of it
follows from figures that every host has, and is saved with each checkpoint: hosts and resumed runs decide alike.
"""

import collections
import json
import math
import pathlib
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rat_jax.config import TrainingConfig
from rat_jax.errors import RunStopped
from rat_jax.files import system_errors
from rat_jax.training.step import NO_LIMIT

_LAG_STEPS = 2  # when step s starts, the losses of the steps up to s - 2 are known, whatever else the host does


class NonFiniteError(RunStopped, ArithmeticError):
    """A loss or a gradient that is not a finite number; the message names the step."""


class BadBatchesError(RunStopped):
    """More bad batches in a row than may be skipped; the message names the step."""


class Guard:
    """Decides on bad batches and remembers what that takes."""

    def __init__(self, config: TrainingConfig, note: Callable[[int, Mapping[str, float], str], None]):
        """Starts without a memory.

        Args:
          config: says what becomes of which batches.
          note: is told of every bad batch: step, figures and what was done with it, "stopped", "skipped" or "reported".
        """
        self._config = config
        self._note = note
        self._num_skipped, self._in_a_row = 0, 0
        # Step and loss of the newest steps that were not skipped.
        self._losses = collections.deque(maxlen=config.spike_window_steps + _LAG_STEPS)

    @property
    def num_skipped(self) -> int:
        """Steps of the run that were skipped."""
        return self._num_skipped

    def max_loss(self, step: int) -> np.float32:
        """Above this loss, `train_step` skips a step."""
        return self._spike(step) if self._config.on_spike == "skip" else NO_LIMIT

    def judge(self, step: int, figures: Mapping[str, float], *, updated: bool) -> str | None:
        """Takes the figures of every step, in order; returns what to say of a bad batch.

        Args:
          step: whose figures they are.
          figures: `loss`, `grad_norm` and `param_norm`.
          updated: whether the step was not skipped.

        Raises:
          NonFiniteError: if a figure is not finite and such batches are not skipped, or the parameters are not.
          BadBatchesError: if too many were skipped in a row.
        """
        config = self._config
        bad = [name for name in ("loss", "grad_norm", "param_norm") if not math.isfinite(figures[name])]
        problem, action = None, None
        if bad:
            problem = f"{bad[0]} is {figures[bad[0]]} at step {step}"
            action = "stopped" if config.on_non_finite == "stop" or "param_norm" in bad else "skipped"
        elif figures["loss"] > (limit := self._spike(step)):
            median = float(limit) / config.spike_factor
            problem = f"loss is {figures['loss']:.4g} at step {step}, the median before it {median:.4g}"
            action = "reported" if config.on_spike == "report" else "skipped"
        if updated:
            self._in_a_row = 0
            if config.on_spike != "ignore":
                self._losses.append((step, figures["loss"]))
        if problem is None:
            return None
        if action == "skipped":
            self._num_skipped += 1
            self._in_a_row += 1
        self._note(step, figures, action)
        if action == "stopped":
            skipping = "" if "param_norm" in bad else "; training.on_non_finite='skip' leaves such batches out"
            raise NonFiniteError(
                f"{problem}; a lower optimizer.learning_rate or a longer warm-up is the usual remedy{skipping}"
            )
        if self._in_a_row > config.max_skips_in_a_row:
            raise BadBatchesError(
                f"{problem}, and the {config.max_skips_in_a_row} steps before it were skipped, too: more than "
                f"training.max_skips_in_a_row allows"
            )
        return f"{problem}: {action}"

    def state(self) -> dict[str, Any]:
        """What a resumed run must know, as values that JSON can hold."""
        return {
            "num_skipped": self._num_skipped,
            "skipped_in_a_row": self._in_a_row,
            "losses": [list(pair) for pair in self._losses],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues as the guard whose `state` this is would have. Of a longer memory the newest part is kept."""
        self._num_skipped, self._in_a_row = state["num_skipped"], state["skipped_in_a_row"]
        self._losses.extend((step, loss) for step, loss in state["losses"])

    def _spike(self, step: int) -> np.float32:
        """The loss above which that of a step is a spike: infinite as long as too few are known."""
        known = [loss for earlier, loss in self._losses if earlier <= step - _LAG_STEPS]
        if self._config.on_spike == "ignore" or len(known) < self._config.spike_window_steps:
            return NO_LIMIT
        median = statistics.median(known[-self._config.spike_window_steps :])
        return np.float32(self._config.spike_factor * median)


def write_bad_batch(
    path: pathlib.Path, step: int, records: list[int], figures: Mapping[str, float], action: str
) -> None:
    """Appends a line to WORKDIR/bad_batches.jsonl.

    Args:
      path: of the file.
      step: that the batch was for, counted from 1: global batch `step - 1`.
      records: indices of the batch's records in the training split.
      figures: of the step; those that are no numbers become null.
      action: what was done with it.

    Raises:
      FileError: if the system refuses.
    """
    values = {name: figures[name] if math.isfinite(figures[name]) else None for name in ("loss", "grad_norm")}
    line = json.dumps({"step": step, "batch": step - 1, "records": records, **values, "action": action})
    with system_errors(path, "written"), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
