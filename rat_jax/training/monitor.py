"""What a run shows and records while it goes: progress bar, log, throughput; and the check that figures are finite."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator

import jax
import tqdm

from rat_jax.config import Config
from rat_jax.data.pipeline import describe_coverage
from rat_jax.errors import RunStopped
from rat_jax.flops import mfu
from rat_jax.training.metrics import MetricLog
from rat_jax.training.step import StepMetrics


class NonFiniteError(RunStopped, ArithmeticError):
    """A loss or a gradient that is not a finite number; the message names the step."""


class TrainMonitor:
    """Follows the steps of a run one step late, so that the device never waits for the host.

    Hosts other than the first only check figures.
    """

    def __init__(self, config: Config, log: MetricLog | None, start_step: int, num_parameters: int):
        """Starts the bar.

        Args:
          config: of the run.
          log: where figures go; None on hosts other than the first.
          start_step: steps done already.
          num_parameters: of the model, for the MFU.
        """
        self._config = config
        self._log = log
        self._num_parameters = num_parameters
        self._pending: tuple[int, StepMetrics] | None = None
        self._clock_step, self._clock_secs = None, 0.0  # where the throughput's measure starts
        self._speed_text = ""
        self._losses: list[float] = []  # of the steps since the last record
        self._called: set[str] = set()  # compiled programs
        self._paused = False
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
          NonFiniteError: if those are not finite.
        """
        self.settle()
        self._pending = (done, metrics)

    def settle(self) -> None:
        """Waits for the figures of the last step and handles them.

        Raises:
          NonFiniteError: if they are not finite.
        """
        if self._pending is None:
            return
        (done, metrics), self._pending = self._pending, None
        figures = {name: float(value) for name, value in metrics._asdict().items()}
        for name in ("loss", "grad_norm", "param_norm"):
            if not math.isfinite(figures[name]):
                raise NonFiniteError(
                    f"{name} is {figures[name]} at step {done}; the checkpoints before it are good. A lower "
                    f"optimizer.learning_rate or a longer warm-up is the usual remedy"
                )
        self._losses.append(figures["loss"])
        self._bar.update(1)
        self._bar.set_postfix_str(f"loss {figures['loss']:.3f}{self._speed_text}", refresh=False)
        if self._clock_step is None:  # the first step compiles
            self._clock_step, self._clock_secs = done, time.perf_counter()
        if done % self._config.training.log_every_steps == 0:
            self._record(done, figures)

    def _record(self, done: int, figures: dict[str, float]) -> None:
        tokens_per_step = self._config.data.global_batch_size * self._config.data.seq_len
        record = figures | {
            "mean_loss": math.fsum(self._losses) / len(self._losses),
            "tokens": done * tokens_per_step,
        }
        self._losses.clear()
        now, steps = time.perf_counter(), done - self._clock_step
        if steps > 0:
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
        if self._log is not None:
            self._log.write(done, record)

    def validation(self, done: int, loss: float, fraction: float) -> None:
        """Shows and records a validation on a fraction of the split."""
        perplexity = math.exp(min(loss, 700.0))
        self.say(
            f"step {done}: validation loss {loss:.4f}, perplexity {perplexity:.3f}, on {describe_coverage(fraction)}"
        )
        if self._log is not None:
            self._log.write(
                done,
                {"validation_loss": loss, "validation_perplexity": perplexity, "validation_fraction": fraction},
            )
            self._log.plot()

    def say(self, message: str) -> None:
        """Prints a line above the bar, on the first host."""
        if jax.process_index() == 0:
            tqdm.tqdm.write(message, file=sys.stderr)

    @contextlib.contextmanager
    def calling(self, program: str) -> Iterator[None]:
        """Stands around every call of a compiled program; the first call compiles it, which is said and timed."""
        if program in self._called:
            yield
            return
        self._called.add(program)
        self.say(f"compiling the {program}, which can take a minute or two ...")
        start = time.perf_counter()
        with self.pause():
            yield
        self.say(f"compiled the {program} in {time.perf_counter() - start:.1f} s")

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """The time of this block counts neither against throughput nor in the bar's forecast."""
        if self._paused:  # the block around this one counts it
            yield
            return
        self._paused, start = True, time.perf_counter()
        yield
        self._paused, secs = False, time.perf_counter() - start
        self._clock_secs += secs
        if not self._bar.disable:
            self._bar.start_t += secs
            self._bar.last_print_t += secs

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()
