"""What a run says of itself: figures to files and services, and how well it uses its devices."""

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rat_jax.checkpoints.owner import Owner
from rat_jax.checkpoints.run_log import Record, RunLog
from rat_jax.checkpoints.workdir import Workdir
from rat_jax.config import Config, ConfigError, config_to_dict
from rat_jax.files import explain
from rat_jax.pictures import write_picture
from rat_jax.training.tensorboard import EventFile

if TYPE_CHECKING:  # drawn with on demand: it takes a second to import
    from matplotlib.figure import Figure


_TENSORBOARD, _WANDB = "TensorBoard's file", "the run at Weights & Biases"


def check_wandb(config: Config) -> None:
    """Checks that Weights & Biases is installed where a config asks for it.

    Raises:
      ConfigError: if it is not.
    """
    if config.training.wandb_project is not None:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise ConfigError(
                f"config.training.wandb_project is {config.training.wandb_project!r}, but Weights & Biases is not "
                f"installed: `pip install wandb`, or leave the field unset"
            ) from None


class MetricLog:
    """Writes figures to WORKDIR/log.jsonl, TensorBoard and, if asked, Weights & Biases.

    The log must be written. Of the others, and of the picture, what fails is reported and from then on left out.
    Nothing is written once another process has the workdir.
    """

    def __init__(
        self,
        workdir: Workdir,
        config: Config,
        start_step: int,
        report: Callable[[str], None],
        owner: Owner | None = None,
    ):
        """Opens the files; figures of steps after `start_step`, which will be done again, are dropped.

        Args:
          workdir: of the run, marked as one.
          config: of the run.
          start_step: steps done.
          report: is told what is wrong with the log, and what could not be written.
          owner: this process as the workdir's; None: nobody else can come.

        Raises:
          FileError: if the log cannot be written.
        """
        self._check_owner = (lambda: None) if owner is None else owner.check_often
        self._workdir = workdir
        self._report = report
        self._log = RunLog(workdir.log_file, start_step)
        if numbers := self._log.bad_lines:
            where = ", ".join(map(str, numbers[:10])) + (" and others" if len(numbers) > 10 else "")
            report(f"{workdir.log_file}: no record is in line {where}; moved to {self._log.bad_file.name}")
        self._num_plotted = 0
        self._failed: set[str] = set()
        self._tensorboard: EventFile | None = None
        self._wandb: Any = None
        self._try(_TENSORBOARD, lambda: self._open_tensorboard(start_step))
        if config.training.wandb_project is not None:
            self._try(_WANDB, lambda: self._open_wandb(config))

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Records figures of a step; each name keeps its meaning over a run.

        Raises:
          FileError: if the log cannot be written.
          HeldError: if another process has taken the workdir.
        """
        self._check_owner()
        self._log.append(step, figures)
        if self._tensorboard is not None:
            self._try(_TENSORBOARD, lambda: self._tensorboard.write(step, figures))
        if self._wandb is not None:
            self._try(_WANDB, lambda: self._wandb.log(dict(figures), step=step))

    def plot(self) -> None:
        """Draws WORKDIR/loss_curve.png.

        Raises:
          HeldError: if another process has taken the workdir.
        """
        if self._num_plotted != len(self._log.records):
            self._check_owner()
            self._try(self._workdir.loss_curve.name, self._draw)
            self._num_plotted = len(self._log.records)

    def close(self) -> None:
        """Draws the curve and closes all.

        Raises:
          HeldError: if another process has taken the workdir; all is closed nevertheless.
        """
        try:
            self.plot()
        finally:
            self._log.close()
            if self._tensorboard is not None:
                self._try(_TENSORBOARD, self._tensorboard.close)
            if self._wandb is not None:
                self._try(_WANDB, self._wandb.finish)

    def _open_tensorboard(self, start_step: int) -> None:
        self._tensorboard = EventFile(self._workdir.tensorboard, purge_step=start_step + 1)

    def _open_wandb(self, config: Config) -> None:
        import wandb

        self._wandb = wandb.init(
            project=config.training.wandb_project,
            dir=str(self._workdir.path),
            name=self._workdir.path.name,
            id=self._workdir.record().wandb_id,
            resume="allow",
            config=config_to_dict(config),
        )

    def _draw(self) -> None:
        figure = loss_figure(self._log.records, title=self._workdir.path.resolve().name)
        write_picture(figure, self._workdir.loss_curve)

    def _try(self, name: str, action: Callable[[], object]) -> None:
        """Does what a run can do without; the first time that it fails is reported."""
        try:
            action()
        except (OSError, *_wandb_errors()) as error:
            if name not in self._failed:
                self._report(f"{name} cannot be written: {explain(error)}. The run goes on without")
            self._failed.add(name)
            if name == _TENSORBOARD:  # what follows half a record cannot be read
                self._tensorboard = None
            elif name == _WANDB:
                self._wandb = None


def _wandb_errors() -> tuple[type[Exception], ...]:
    """What Weights & Biases raises, if it is in use."""
    wandb = sys.modules.get("wandb")
    return () if wandb is None else (wandb.Error,)


def loss_figure(records: list[Record], title: str) -> "Figure":
    """A picture of the training and validation losses of a log's records.

    A training point is the mean over the steps since the point before; of a log that has no means, it is one step's.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    training = [(record["step"], record.get("mean_loss", record.get("loss"))) for record in records]
    validation = [(record["step"], record.get("validation_loss")) for record in records]
    for points, label, style in (
        (training, "training, mean since the last point", {"linewidth": 1}),
        (validation, "validation", {"linewidth": 2, "marker": "o", "markersize": 4}),
    ):
        finite = [(step, loss) for step, loss in points if loss is not None]
        if finite:
            axes.plot(*zip(*finite, strict=True), label=label, **style)
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    return figure
