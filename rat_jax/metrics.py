"""What a run says of itself: figures to files and services, and how well it uses its devices."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import tensorboardX

from rat_jax.config import Config, ConfigError, ModelConfig, config_to_dict
from rat_jax.workdir import Workdir, write_text

# Dense bfloat16 FLOP/s of one device, by the start of its name in JAX; the first that fits.
_PEAK_FLOPS = (
    ("NVIDIA H200", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA GH200", 989e12),
    ("NVIDIA A100", 312e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),  # v5p
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
)


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 FLOP/s that a device can do, or None where it is not known."""
    return next((flops for name, flops in _PEAK_FLOPS if device.device_kind.startswith(name)), None)


def flops_per_token(config: ModelConfig, num_parameters: int, seq_len: int) -> float:
    """Floating-point operations that training on one token takes, for the model FLOPs utilisation (MFU).

    6 P + 12 D sum_layers K: each of P parameters (the embedding counts once, as the head) is multiplied and added
    once forward and twice backward; so is each of the D channels for scores and for values of the K keys that a token
    sees on average. K = (T + 1) / 2 for attention, no more than window + 1 earlier tokens for local attention,
    (T / L - 1) / 2 + 1 for RAT, 0 for the RNN. RAttention has its window's and a state of 2 H by H, written once for
    each key head and read once for each query head, which counts as H (1 + num_kv_heads / num_heads) keys. Recomputed
    and elementwise operations are not counted.
    """
    repeats = config.num_layers // len(config.pattern)
    num_keys = sum(repeats * _mean_keys(kind, config, seq_len) for kind in config.pattern)
    return 6.0 * num_parameters + 12.0 * config.width * num_keys


def _mean_keys(kind: str, config: ModelConfig, seq_len: int) -> float:
    match kind:
        case "attention":
            return (seq_len + 1) / 2
        case "local_attention":
            return _mean_window(config.local_attention.window, seq_len)
        case "rattention":
            state = config.head_dim * (1 + config.kv_heads / config.num_heads)
            return _mean_window(config.rattention.window, seq_len) + state
        case "rat":
            chunk_size = min(config.rat.chunk_size, seq_len)
            return (seq_len / chunk_size - 1) / 2 + 1
        case "rnn":
            return 0.0
        case _:
            raise ValueError(f"no mixer is called {kind!r}")


def _mean_window(window: int, seq_len: int) -> float:
    most = min(window + 1, seq_len)
    return most - most * (most - 1) / (2 * seq_len)  # the first `most` tokens see 1, 2, ..., most


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
            plot_losses(self._records, self._workdir.loss_curve)
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


def plot_losses(records: list[dict[str, Any]], path: pathlib.Path) -> None:
    """A picture of the training and validation losses of a log's records."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, label, style in (("loss", "training", "-"), ("validation_loss", "validation", "o-")):
        points = [(record["step"], record[name]) for record in records if math.isfinite(record.get(name, math.nan))]
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, style, label=label, linewidth=1 if style == "-" else 2, markersize=4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)
