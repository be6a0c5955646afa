"""The folder of a run: where its files lie, and whether a config may resume in it.

run.json              marks the folder as a run's, and shows the config of its latest start
tokenizer/            of the data
checkpoints/STEP/     see `rat_jax.checkpoints.store`
log.jsonl             one JSON object a line: figures of training steps and of validations. `loss` is that step's,
                      `mean_loss` the mean over the steps since the line before (or since the start of the process);
                      `validation_fraction` is the part of the split that `validation_loss` was measured on
bad_batches.jsonl     the records of batches with a loss or gradient that is no finite number, or a spike of the loss
                      (`rat_jax.training.guards`); a step that was done twice may be there twice
tensorboard/          the same for TensorBoard
loss_curve.png
"""

import dataclasses
import json
import pathlib
from typing import Any

from rat_jax.config import Config, config_to_dict
from rat_jax.errors import RatJaxError
from rat_jax.files import write_json

FORMAT_VERSION = 1
_FORMAT_KEY = "rat_jax_format_version"

# Fields that decide what is reported, kept or where it runs, not what is computed: a run may resume with others. So it
# may with those that say what becomes of a bad batch.
_FREE_FIELDS = (
    "training.log_every_steps",
    "training.validate_every_steps",
    "training.checkpoint_every_steps",
    "training.checkpoints_to_keep",
    "training.wandb_project",
    "training.on_non_finite",
    "training.on_spike",
    "training.spike_factor",
    "training.spike_window_steps",
    "training.max_skips_in_a_row",
    "data.num_workers",
    "data.path",  # the data's fingerprint is compared instead
    "optimizer.accumulation_steps",
    "model.remat",
    "model.scan_unroll",
    "mesh.data",
    "mesh.fsdp",
)


class CheckpointError(RatJaxError, ValueError):
    """A workdir or a checkpoint that cannot be used; the message names it and says what to change."""


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Paths of a run's files."""

    path: pathlib.Path

    @property
    def run_file(self) -> pathlib.Path:
        return self.path / "run.json"

    @property
    def tokenizer(self) -> pathlib.Path:
        return self.path / "tokenizer"

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.path / "checkpoints"

    @property
    def log_file(self) -> pathlib.Path:
        return self.path / "log.jsonl"

    @property
    def bad_batches_file(self) -> pathlib.Path:
        return self.path / "bad_batches.jsonl"

    @property
    def tensorboard(self) -> pathlib.Path:
        return self.path / "tensorboard"

    @property
    def loss_curve(self) -> pathlib.Path:
        return self.path / "loss_curve.png"

    def is_new(self) -> bool:
        """Whether nothing is there yet.

        Raises:
          CheckpointError: if something is there that is no run's.
        """
        if not self.path.exists():
            return True
        if self.path.is_dir() and not any(self.path.iterdir()):
            return True
        self.require_run()
        return False

    def require_run(self) -> None:
        """Checks that a run, or an imported model, is here.

        Raises:
          CheckpointError: if not.
        """
        if not self.path.is_dir():
            raise CheckpointError(f"there is no workdir {self.path}")
        if not self.run_file.is_file():
            raise CheckpointError(
                f"{self.path} is not the workdir of a run: it has no {self.run_file.name}; it is left as it is, "
                f"choose another --workdir"
            )
        try:
            version = json.loads(self.run_file.read_text())[_FORMAT_KEY]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.run_file} is not a run's: {error!r}; choose another --workdir") from None
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{self.run_file} has format version {version}; this code reads {FORMAT_VERSION}")

    def mark(self, config: Config) -> None:
        """Makes the folder a run's."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.run_file, {_FORMAT_KEY: FORMAT_VERSION, "config": config_to_dict(config)})


def check_same_run(saved: Config, current: Config, path: pathlib.Path) -> None:
    """Refuses to resume from a checkpoint with a config that computes something else.

    Raises:
      CheckpointError: naming the fields that differ, with both values.
    """
    _refuse(_differences(saved, current, _FREE_FIELDS), path, "was trained with another config")


def check_same_model(saved: Config, current: Config, path: pathlib.Path) -> None:
    """Refuses to start from the parameters of another model.

    Raises:
      CheckpointError: naming the fields that differ, with both values.
    """
    current = dataclasses.replace(saved, model=current.model)
    _refuse(
        _differences(saved, current, ("model.remat", "model.scan_unroll", "model.dtype")), path, "holds another model"
    )


def _refuse(differences: list[str], path: pathlib.Path, problem: str) -> None:
    if differences:
        raise CheckpointError(f"{path} {problem}: {'; '.join(differences)}. Set it back, or choose another --workdir")


def _differences(saved: Config, current: Config, free: tuple[str, ...]) -> list[str]:
    there, here = _flatten(config_to_dict(saved), ""), _flatten(config_to_dict(current), "")
    return [
        f"config.{name} is {there.get(name, 'not set')!r} there, {here.get(name, 'not set')!r} now"
        for name in {**here, **there}
        if there.get(name) != here.get(name) and name not in free
    ]


def _flatten(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
