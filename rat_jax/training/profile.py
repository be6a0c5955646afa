"""A trace of chosen training steps, for TensorBoard's profiler or Perfetto."""

import pathlib
from collections.abc import Callable

import jax

from rat_jax.config import TrainingConfig
from rat_jax.files import explain


class StepProfile:
    """Traces the steps that a config names, on the first host; a run goes on without one that cannot be written."""

    def __init__(self, config: TrainingConfig, folder: pathlib.Path, start: int, say: Callable[[str], None]):
        """Takes what it needs.

        Args:
          config: says which steps.
          folder: where traces go.
          start: steps done; steps before are not traced again.
          say: is told where the trace is, or why there is none.
        """
        self._folder, self._say = folder, say
        first = config.profile_step
        is_due = first is not None and first > start and jax.process_index() == 0
        self._first = first if is_due else None
        self._last = None if first is None else first + config.profile_num_steps - 1
        self._is_tracing = False

    def before(self, step: int) -> None:
        """To be called before a step is started, counted from 1."""
        if step == self._first:
            self._is_tracing = self._try(lambda: jax.profiler.start_trace(self._folder))

    def after(self, step: int, wait: Callable[[], None]) -> None:
        """To be called when a step has been started; `wait` waits for it."""
        if self._is_tracing and step == self._last:
            wait()
            self.close()

    def close(self) -> None:
        """Ends a trace, whole or not."""
        if self._is_tracing:
            self._is_tracing = False
            if self._try(jax.profiler.stop_trace):
                self._say(f"a trace of steps {self._first} to {self._last} is in {self._folder}")

    def _try(self, action: Callable[[], None]) -> bool:
        try:
            action()
        except (OSError, RuntimeError) as error:  # the profiler's own errors are RuntimeErrors
            self._say(f"there is no trace of steps {self._first} to {self._last}: {explain(error)}")
            return False
        return True
