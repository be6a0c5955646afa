"""What a run shows and records while it goes: progress bar, log, throughput."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Mapping

import jax
import tqdm

from rat_jax import cluster
from rat_jax.config import Config
from rat_jax.flops import mfu
from rat_jax.training.guards import Guard, NonFiniteError
from rat_jax.training.metrics import MetricLog
from rat_jax.training.step import StepMetrics
from rat_jax.training.time_shares import Activity, TimeShares
from rat_jax.training.validation import ValidationResult


def say(message: str) -> None:
    """Prints a line, above a bar if there is one, on the first host."""
    if jax.process_index() == 0:
        tqdm.tqdm.write(message, file=sys.stderr)


class TrainMonitor:
    """Follows the steps of a run one step late, so that the device never waits for the host.

    Hosts other than the first only check figures.

    Attributes:
      times: what the loop's time goes to; its shares are in the log.
    """

    def __init__(self, config: Config, guard: Guard, log: MetricLog | None, start_step: int, num_parameters: int):
        """Starts the bar.

        Args:
          config: of the run.
          guard: judges the figures.
          log: where figures go; None on hosts other than the first.
          start_step: steps done already.
          num_parameters: of the model, for the MFU.
        """
        self._config = config
        self._guard = guard
        self._log = log
        self._num_parameters = num_parameters
        self._pending: tuple[int, StepMetrics] | None = None
        # Where the throughput's measure starts: the last record. The time to the first one is no measure, since it
        # holds first calls, after which the device is ahead of the host or behind it.
        self._clock_step, self._clock_secs = None, 0.0
        self._speed_text = ""
        self._losses: list[float] = []  # of the steps since the last record
        self._called: set[str] = set()  # compiled programs
        self._paused = False
        self.times = TimeShares()
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm.tqdm(
            total=config.training.num_steps,
            initial=start_step,
            unit="step",
            disable=log is None,
            mininterval=0.2 if on_terminal else 15.0,
            dynamic_ncols=on_terminal,
            smoothing=0.05,
        )

    def step(self, done: int, metrics: StepMetrics) -> None:
        """Takes the figures of the step just started, and handles those of the step before.

        Raises:
          NonFiniteError, BadBatchesError: if those end the run.
        """
        before, self._pending = self._pending, (done, metrics)
        self._handle(before)

    def settle(self) -> None:
        """Waits for the figures of the last step and handles them.

        Raises:
          NonFiniteError, BadBatchesError: if they end the run.
        """
        before, self._pending = self._pending, None
        self._handle(before)

    def _handle(self, started: tuple[int, StepMetrics] | None) -> None:
        if started is None:
            return
        done, metrics = started
        figures = {name: float(value) for name, value in jax.device_get(metrics)._asdict().items()}
        updated = bool(figures.pop("updated"))
        if (message := self._guard.judge(done, figures, updated=updated)) is not None:
            say(message)
        if updated:
            self._losses.append(figures["loss"])
        self._bar.update(1)
        self._bar.set_postfix_str(f"loss {figures['loss']:.3f}{self._speed_text}", refresh=False)
        if done % self._config.training.log_every_steps == 0:
            self._record(done, figures)

    def _record(self, done: int, figures: dict[str, float]) -> None:
        tokens_per_step = self._config.data.global_batch_size * self._config.data.seq_len
        record = {name: value for name, value in figures.items() if math.isfinite(value)}
        if self._losses:
            record["mean_loss"] = math.fsum(self._losses) / len(self._losses)
        record |= {"tokens": done * tokens_per_step, "skipped_steps": self._guard.num_skipped}
        self._losses.clear()
        now = time.perf_counter()
        if self._clock_step is not None:
            steps = done - self._clock_step
            secs_per_step = (now - self._clock_secs) / steps
            record["tokens_per_sec"] = tokens_per_step / secs_per_step
            self._speed_text = f", {record['tokens_per_sec']:,.0f} tokens/s"
            per_device = record["tokens_per_sec"] / jax.device_count()
            model, seq_len = self._config.model, self._config.data.seq_len
            used = mfu(model, self._num_parameters, seq_len, per_device, jax.devices()[0])
            if used is not None:
                record["mfu"] = used
                self._speed_text += f", MFU {record['mfu']:.1%}"
        self._clock_step, self._clock_secs = done, now
        record |= {f"time_share_{activity}": share for activity, share in self.times.take().items()}
        if self._log is not None:
            self._log.write(done, record)

    def validation(self, done: int, result: ValidationResult, coverage: str) -> None:
        """Shows and records a validation; `coverage` says on what.

        Raises:
          NonFiniteError: if its loss is not finite.
        """
        if not math.isfinite(result.loss):
            raise NonFiniteError(
                f"validation loss is {result.loss} after step {done}; a lower optimizer.learning_rate or a longer "
                f"warm-up is the usual remedy"
            )
        parts = ", ".join(f"{name} {loss:.4f}" for name, (loss, _) in result.parts.items())
        parts = f" ({parts})" if parts else ""
        say(f"step {done}: validation loss {result.loss:.4f}{parts}, perplexity {result.perplexity:.3f}, on {coverage}")
        if self._log is not None:
            self._log.write(done, result.figures())
            self._log.plot()

    def evaluation(self, done: int, message: str, figures: Mapping[str, float]) -> None:
        """Shows and records what an evaluation found, under names that no other figure has."""
        say(message)
        if self._log is not None:
            self._log.write(done, figures)

    @contextlib.contextmanager
    def calling(self, program: str) -> Iterator[None]:
        """Stands around every call of a compiled program; the first call compiles it, which is said and timed."""
        if program in self._called:
            yield
            return
        self._called.add(program)
        say(f"compiling the {program}, which can take a minute or two ...")
        start = time.perf_counter()
        with self.pause("compiling"), cluster.busy():
            yield
        say(f"compiled the {program} in {time.perf_counter() - start:.1f} s")

    @contextlib.contextmanager
    def pause(self, activity: Activity) -> Iterator[None]:
        """The time of this block counts neither against throughput nor in the bar's forecast."""
        with self.times.spent_on(activity):
            if self._paused:  # the block around this one counts it
                yield
                return
            self._paused, start = True, time.perf_counter()
            try:
                yield
            finally:
                self._paused = False
        secs = time.perf_counter() - start
        self._clock_secs += secs
        if not self._bar.disable:
            self._bar.start_t += secs
            self._bar.last_print_t += secs

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()
