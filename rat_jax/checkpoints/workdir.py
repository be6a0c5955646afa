"""The folder of a run: where its files lie, and whether a config may resume in it.

owner.json            while a process owns the folder, see `rat_jax.checkpoints.owner`
run.json              marks the folder as a run's: the config of its latest start, the newest step that was saved
                      ("saved_step": 0 if a model alone, null if nothing yet), its id at Weights & Biases, and where
                      its first parameters came from ("origin", null if they were drawn; `rat_jax.training.origin`)
tokenizer/            of the data; of chats with the template that made texts of them
checkpoints/STEP/     see `rat_jax.checkpoints.store`
log.jsonl             one JSON object a line: figures of training steps and of validations, null where one is no number
                      (see `rat_jax.checkpoints.run_log`). `loss` is that step's, `mean_loss` the mean over the steps
                      since the line before (or since the start of the process); `validation_fraction` is the part of
                      the split that `validation_loss` was measured on. Of several corpora `validation_loss/NAME` and
                      `validation_fraction/NAME` are of one, and without a name of all, the loss by their weights
log.jsonl.bad         lines of it that were no records
bad_batches.jsonl     the records of batches with a loss or gradient that is no finite number, or a spike of the loss
                      (`rat_jax.training.guards`); a step that was done twice may be there twice
tensorboard/          the same for TensorBoard
loss_curve.png
"""

import dataclasses
import os
import pathlib
import secrets
import shutil
from typing import Any

from rat_jax.config import Config, ModelConfig, config_to_dict
from rat_jax.data import DataError
from rat_jax.data.chat_template import ChatTemplate, load_chat_template
from rat_jax.data.tokenizer import Tokenizer, load_tokenizer
from rat_jax.errors import RatJaxError
from rat_jax.files import ContentError, read_object, system_errors, write_json

FORMAT_VERSION = 1
OWNER_FILE = "owner.json"
_FORMAT_KEY = "rat_jax_format_version"

# Fields that decide what is reported, kept or where it runs, not what is computed: a run may resume with others. So it
# may with those that say what becomes of a bad batch.
_FREE_FIELDS = (
    "training.log_every_steps",
    "training.validate_every_steps",
    "training.checkpoint_every_steps",
    "training.checkpoint_every_minutes",
    "training.checkpoints_to_keep",
    "training.wandb_project",
    "training.on_non_finite",
    "training.on_spike",
    "training.spike_factor",
    "training.spike_window_steps",
    "training.max_skips_in_a_row",
    "training.profile_step",
    "training.profile_num_steps",
    "data.num_workers",
    "data.path",  # the data's fingerprint is compared instead
    "data.corpora",
    "optimizer.accumulation_steps",
    "model.remat",
    "model.scan_unroll",
    "mesh.data",
    "mesh.fsdp",
    "evaluation.on_failure",
    "evaluation.length.every_steps",
    "evaluation.length.lengths",
    "evaluation.length.max_batches",
    "evaluation.length.batch_tokens",
    "evaluation.ruler.every_steps",
    "evaluation.ruler.tasks",
    "evaluation.ruler.context_lengths",
    "evaluation.ruler.num_examples",
    "evaluation.ruler.templates",
    "evaluation.ruler.essay",
    "evaluation.ruler.answer_tokens",
    "evaluation.ruler.seed",
    "evaluation.ruler.batch_tokens",
    "evaluation.answers.every_steps",
    "evaluation.answers.file",
    "evaluation.answers.context_length",
    "evaluation.answers.max_new_tokens",
    "evaluation.answers.limit",
    "evaluation.answers.batch_tokens",
    "evaluation.tasks.every_steps",
    "evaluation.tasks.names",
    "evaluation.tasks.folder",
    "evaluation.tasks.limit",
    "evaluation.tasks.batch_tokens",
)


# Of a model that a run starts from.
_FREE_MODEL_FIELDS = ("model.remat", "model.scan_unroll", "model.dtype")
_ADVICE = "Set it back, or choose another --workdir"


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
    def profile(self) -> pathlib.Path:
        return self.path / "profile"

    @property
    def loss_curve(self) -> pathlib.Path:
        return self.path / "loss_curve.png"

    def is_new(self) -> bool:
        """Whether nothing is there yet, or only what a start leaves that was killed before the folder was a run's.

        Raises:
          CheckpointError: if something is there that is no run's.
          FileError: if the system refuses to look.
        """
        self._check_link()
        with system_errors(self.path, "read"):
            if not self.path.exists():
                return True
            if self.path.is_dir() and all(_is_leftover(path) for path in self.path.iterdir()):
                return True
        self.require_run()
        return False

    def require_run(self) -> None:
        """Checks that a run, or an imported model, is here; errors as of `record`."""
        self.record()

    def record(self) -> "RunRecord":
        """What `run.json` says.

        Raises:
          CheckpointError: if the folder is missing or no run's.
          FileError: if the system refuses to read it.
        """
        self._check_link()
        with system_errors(self.path, "read"):
            if not self.path.exists():
                raise CheckpointError(f"there is no workdir {self.path}")
            if not self.path.is_dir():
                raise CheckpointError(f"{self.path} is no folder; choose another --workdir")
        try:
            values = read_object(self.run_file)
        except FileNotFoundError:
            raise CheckpointError(
                f"{self.path} is not the workdir of a run: it has no {self.run_file.name}; it is left as it is, "
                f"choose another --workdir"
            ) from None
        except ContentError as error:
            least = f'{{"{_FORMAT_KEY}": {FORMAT_VERSION}}}'
            raise CheckpointError(
                f"{error}; if {self.path} is a run's, write {least} into that file, else choose another --workdir"
            ) from None
        version = values.get(_FORMAT_KEY)
        if version is None:
            raise CheckpointError(f"{self.run_file} is not a run's: it has no {_FORMAT_KEY}; choose another --workdir")
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{self.run_file} has format version {version}; this code reads {FORMAT_VERSION}")
        step, wandb_id, origin = values.get("saved_step"), values.get("wandb_id"), values.get("origin")
        if not (step is None or (type(step) is int and step >= 0)) or not isinstance(wandb_id, str | None):
            raise CheckpointError(
                f"{self.run_file} is damaged: saved_step must be a number of steps and wandb_id a name, or null, got "
                f"{step!r} and {wandb_id!r}"
            )
        if not isinstance(origin, dict | None):
            raise CheckpointError(f"{self.run_file} is damaged: origin must be an object or null, got {origin!r}")
        config = values["config"] if isinstance(values.get("config"), dict) else {}
        training = config["training"] if isinstance(config.get("training"), dict) else {}
        if "wandb_id" not in values and training.get("wandb_project") is not None:
            wandb_id = self.path.name  # which it was before it was written down
        every = training.get("checkpoint_every_steps")
        every = every if type(every) is int and every > 0 else None
        return RunRecord(config, step, wandb_id, every, "saved_step" in values, origin)

    def mark(self, config: Config, saved_step: int | None, origin: dict[str, Any] | None = None) -> None:
        """Makes the folder a run's, with an id at Weights & Biases if the config asks for one and it has none yet.

        Args:
          config: of this start.
          saved_step: the newest one that was saved; 0: a model alone; None: nothing yet.
          origin: where the parameters came from that this start begins with; None: as it is written there, if it is.

        Raises:
          FileError: if the system refuses.
        """
        record = None if self.is_new() else self.record()
        wandb_id = None if record is None else record.wandb_id
        if origin is None and record is not None and saved_step is not None:
            origin = record.origin
        if wandb_id is None and config.training.wandb_project is not None:
            wandb_id = secrets.token_hex(8)
        with system_errors(self.path, "made"):
            self.path.mkdir(parents=True, exist_ok=True)
        self._write(config_to_dict(config), saved_step, wandb_id, origin)

    def note_saved(self, step: int) -> None:
        """Writes down that a checkpoint of `step` is complete; errors as of `record`."""
        record = self.record()
        self._write(record.config, step, record.wandb_id, record.origin)

    def _write(
        self, config: dict[str, Any], saved_step: int | None, wandb_id: str | None, origin: dict[str, Any] | None
    ) -> None:
        values = {"config": config, "saved_step": saved_step, "wandb_id": wandb_id, "origin": origin}
        write_json(self.run_file, {_FORMAT_KEY: FORMAT_VERSION, **values})

    def save_tokenizer(self, tokenizer: Tokenizer, chat_template: ChatTemplate | None = None) -> None:
        """Writes the tokenizer, unless it is there already; at no moment is half of one there.

        Args:
          tokenizer: of the model.
          chat_template: what makes texts of chats, written beside it.

        Raises:
          FileError: if the system refuses.
        """
        try:
            is_there = self.tokenizer.is_dir() and load_tokenizer(self.tokenizer).hash == tokenizer.hash
            if is_there and load_chat_template(self.tokenizer) == chat_template:
                return
        except DataError:  # of a start that was killed
            pass
        partial = self.path / "tokenizer.partial"
        with system_errors(self.tokenizer, "written"):
            for folder in (partial, self.tokenizer):
                if folder.exists():
                    shutil.rmtree(folder)
            partial.mkdir()
            tokenizer.save(partial)
            if chat_template is not None:
                chat_template.save(partial)
            partial.rename(self.tokenizer)

    def _check_link(self) -> None:
        if self.path.is_symlink() and not self.path.exists():
            raise CheckpointError(
                f"{self.path} is a link to {os.readlink(self.path)}, which is not there: make that folder, or remove "
                f"the link"
            )


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What `run.json` says of a run."""

    config: dict[str, Any]  # of its latest start, as it was written
    saved_step: int | None  # the newest that was saved; 0: a model alone; None: none yet, or not noted
    wandb_id: str | None
    checkpoint_every_steps: int | None  # of its latest start
    notes_saves: bool  # False: written by code that did not note them
    origin: dict[str, Any] | None = None  # where its first parameters came from; None: they were drawn, or not noted


def _is_leftover(path: pathlib.Path) -> bool:
    """Whether a start that was killed before it wrote `run.json` may have left this, or the owner's file."""
    if path.is_dir():
        return path.name in ("tokenizer", "checkpoints", "tensorboard") and not any(path.iterdir())
    if path.name.startswith(".nfs"):  # NFS keeps removed files under such names while they are open
        return True
    return path.name == OWNER_FILE or path.name.endswith(".partial")


def check_same_run(saved: Config, current: Config, path: pathlib.Path) -> None:
    """Refuses to resume from a checkpoint with a config that computes something else.

    Raises:
      CheckpointError: naming the fields that differ, with both values; of more steps, also the flags of a new run.
    """
    advice = _ADVICE
    more = current.training.num_steps - saved.training.num_steps
    if more > 0 and not _model_differences(saved.model, current.model):
        advice += (
            f". A schedule cannot be made longer afterwards; to train its model on, start a new run from it: "
            f"--workdir=ANOTHER --config.init.path={path} --config.init.optimizer=True "
            f"--config.training.num_steps={more}"
        )
    if differing := _differences(config_to_dict(saved), config_to_dict(current), _FREE_FIELDS):
        raise CheckpointError(f"{path} was trained with another config: {differing}. {advice}")


def check_same_model(saved: ModelConfig, current: ModelConfig, path: pathlib.Path, advice: str = _ADVICE) -> None:
    """Refuses to start from the parameters of another model.

    Raises:
      CheckpointError: naming the fields that differ, with both values, and giving the advice.
    """
    if differing := _model_differences(saved, current):
        raise CheckpointError(f"{path} holds another model: {differing}. {advice}")


def _model_differences(saved: ModelConfig, current: ModelConfig) -> str:
    """Those between models that cannot have the same parameters."""
    for name, meaning in (("mlp_width", "mlp_hidden"), ("num_kv_heads", "kv_heads")):  # None stands for a number
        if getattr(saved, meaning) == getattr(current, meaning):
            saved = dataclasses.replace(saved, **{name: getattr(current, name)})
    return _differences({"model": config_to_dict(saved)}, {"model": config_to_dict(current)}, _FREE_MODEL_FIELDS)


def _differences(saved: dict[str, Any], current: dict[str, Any], free: tuple[str, ...]) -> str:
    there, here = flatten(saved), flatten(current)
    return "; ".join(
        f"config.{name} is {there.get(name, 'not set')!r} there, {here.get(name, 'not set')!r} now"
        for name in {**here, **there}
        if there.get(name) != here.get(name) and not any(f"{name}.".startswith(f"{field}.") for field in free)
    )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a nested dict by dotted names."""
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
