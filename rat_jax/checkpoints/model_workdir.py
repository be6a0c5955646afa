"""A workdir that holds a model alone, without an optimizer: what training, evaluation and generation start from."""

import contextlib
import pathlib

from flax import nnx

from rat_jax.checkpoints.folder import step_folders
from rat_jax.checkpoints.manifest import MANIFEST_FILE, MODEL_ONLY_FOLDER
from rat_jax.checkpoints.owner import owned
from rat_jax.checkpoints.store import Checkpoints
from rat_jax.checkpoints.workdir import CheckpointError, Workdir
from rat_jax.config import Config, with_absolute_paths
from rat_jax.data.chat_template import ChatTemplate
from rat_jax.data.tokenizer import Tokenizer
from rat_jax.errors import RunStopped
from rat_jax.files import FileError
from rat_jax.model import LanguageModel
from rat_jax.paths import local_path


def save_model(
    workdir: pathlib.Path | str,
    config: Config,
    model: LanguageModel,
    step: int,
    tokenizer: Tokenizer | None = None,
    chat_template: ChatTemplate | None = None,
) -> pathlib.Path:
    """Makes a workdir that holds a model only, from which training, evaluation and generation can start.

    Training takes the parameters, and starts with a new optimizer at the first step of its schedule.

    Args:
      workdir: a folder that is missing or empty.
      config: whose `model` part is the model's.
      model: its parameters are saved in float32.
      step: optimizer steps that the model was trained for, for information.
      tokenizer: of the model, saved in the workdir, if known.
      chat_template: what makes texts of chats, saved beside the tokenizer.

    Returns:
      The checkpoint's folder.

    Raises:
      CheckpointError: if the folder is not empty or in use.
      FileError: if the system refuses the first write.
      RunStopped: if it refuses a later one; the message says what is there.
    """
    workdir = Workdir(local_path(workdir, "workdir"))
    if config.model != model.config:
        raise CheckpointError("config.model is not the config of the model that is to be saved")
    config = with_absolute_paths(config)
    require_unused(workdir)
    with owned(workdir.path) as owner:
        require_unused(workdir)
        workdir.mark(config, None)
        checkpoints = Checkpoints(workdir, config, lambda message: None, owner)
        try:
            with contextlib.closing(checkpoints):
                if tokenizer is not None:
                    workdir.save_tokenizer(tokenizer, chat_template)
                checkpoints.latest()  # sets aside what an import that was killed has left
                checkpoints.save(step, nnx.state(model), None, None)
        except (CheckpointError, FileError) as error:
            nothing = "no model was saved yet, and the same command starts again"
            kept = nothing if checkpoints.saved_step is None else "the model is saved"
            raise RunStopped(f"{error}; {kept}") from error
    return workdir.checkpoints / MODEL_ONLY_FOLDER


def require_unused(workdir: Workdir) -> None:
    """Refuses a folder that holds anything but what a start leaves that was killed before it had saved anything."""
    message = f"{workdir.path} is there already and not empty; it is left as it is"
    try:
        record = None if workdir.is_new() else workdir.record()
    except CheckpointError as error:
        raise CheckpointError(f"{message} ({error})" if workdir.path.is_dir() else str(error)) from None
    if record is None:
        return
    saved = (
        record.saved_step is not None
        or not record.notes_saves
        or any((path / MANIFEST_FILE).is_file() for path in step_folders(workdir.checkpoints))
    )
    if saved or workdir.log_file.exists():
        raise CheckpointError(message)
