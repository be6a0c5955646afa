"""What a run says of itself: figures to files and services, and how well it uses its devices."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rat_jax.checkpoints.workdir import Workdir
from rat_jax.config import Config, ConfigError, config_to_dict
from rat_jax.files import write_text

if TYPE_CHECKING:  # drawn with on demand: it takes a second to import
    from matplotlib.figure import Figure


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
    """Writes figures to WORKDIR/log.jsonl, TensorBoard and, if asked, Weights & Biases."""

    def __init__(self, workdir: Workdir, config: Config, start_step: int):
        """Opens the files; figures of steps after `start_step`, which will be done again, are dropped."""
        import tensorboardX  # here, since it imports PyTorch where that is installed, which takes seconds

        self._workdir = workdir
        self._records = [record for record in read_log(workdir.log_file) if record["step"] <= start_step]
        write_text(workdir.log_file, "".join(json.dumps(record) + "\n" for record in self._records))
        self._file = workdir.log_file.open("a")
        self._tensorboard = tensorboardX.SummaryWriter(str(workdir.tensorboard), purge_step=start_step + 1)
        self._num_plotted = 0
        self._wandb = None
        if config.training.wandb_project is not None:
            import wandb

            self._wandb = wandb.init(
                project=config.training.wandb_project,
                dir=str(workdir.path),
                name=workdir.path.name,
                id=workdir.path.name,
                resume="allow",
                config=config_to_dict(config),
            )

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Records figures of a step; each name keeps its meaning over a run."""
        record = {"step": step, **figures}
        self._records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in figures.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(figures), step=step)

    def plot(self) -> None:
        """Draws WORKDIR/loss_curve.png."""
        if self._num_plotted != len(self._records):
            figure = loss_figure(self._records, title=self._workdir.path.resolve().name)
            figure.savefig(self._workdir.loss_curve, dpi=120)
            self._num_plotted = len(self._records)

    def close(self) -> None:
        """Draws the curve and closes all."""
        self.plot()
        self._file.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_log(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a log; a last line that was cut short by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]  # the last one has no line end


def loss_figure(records: list[dict[str, Any]], title: str) -> "Figure":
    """A picture of the training and validation losses of a log's records.

    A training point is the mean over the steps since the point before; of a log that has no means, it is one step's.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    training = [(record["step"], record.get("mean_loss", record["loss"])) for record in records if "loss" in record]
    validation = [(record["step"], record["validation_loss"]) for record in records if "validation_loss" in record]
    for points, label, style in (
        (training, "training, mean since the last point", {"linewidth": 1}),
        (validation, "validation", {"linewidth": 2, "marker": "o", "markersize": 4}),
    ):
        finite = [(step, loss) for step, loss in points if math.isfinite(loss)]
        if finite:
            axes.plot(*zip(*finite, strict=True), label=label, **style)
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    return figure
