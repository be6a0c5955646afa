"""Checkpoints: complete, verified and of one format, however the process that wrote them ended.

WORKDIR/checkpoints/STEP/
  params/          the model's parameters, by name
  optimizer/       the optimizer's state, by name; not there where only a model was saved
  manifest.json    written last: config, position of the data, versions, arrays, sizes and SHA-256 of all other files

A checkpoint without a manifest was not finished. Orbax, which writes and reads the arrays, is used in this file alone.
"""

import concurrent.futures
import dataclasses
import pathlib
import platform
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from rat_jax.checkpoints.manifest import MANIFEST_FILE, Manifest, sha256
from rat_jax.checkpoints.workdir import CheckpointError, Workdir
from rat_jax.config import Config, ModelConfig
from rat_jax.data.tokenizer import Tokenizer
from rat_jax.model import LanguageModel
from rat_jax.sharding import leaf_names, shardings

__all__ = ["CheckpointError", "Checkpoints", "LoadedModel", "Manifest", "load_model", "save_model"]

MODEL_ONLY_FOLDER = 0  # where a model alone is saved: a run that starts from it saves later steps


class Checkpoints:
    """The checkpoints of a run: saved in the background, the newest `keep` of them kept."""

    def __init__(self, workdir: Workdir, config: Config, report: Callable[[str], None]):
        """Touches nothing yet.

        Args:
          workdir: of the run.
          config: of the run, saved with each checkpoint.
          report: is told what was saved, found damaged or removed.
        """
        self._folder = workdir.checkpoints.absolute()
        self._config = config
        self._report = report
        self._manager: ocp.CheckpointManager | None = None
        self._background = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None

    def peek(self) -> Manifest | None:
        """The newest manifest that can be read, its files not looked at; None if there is none."""
        for path in _step_folders(self._folder):
            try:
                return Manifest.read(path)
            except CheckpointError:  # `latest` reports it
                continue
        return None

    def latest(self) -> tuple[pathlib.Path, Manifest] | None:
        """The newest checkpoint whose files are all as they were written, or None.

        What is newer is reported and set aside, so that its step can be saved again: removed if it was never
        finished, else moved to `damaged-STEP`.
        """
        self._remove_partial()
        for path in _step_folders(self._folder):
            try:
                manifest = Manifest.read(path)
                manifest.verify(path)
                return path, manifest
            except CheckpointError as error:
                self._set_aside(path, error)
        if damaged := sorted(self._folder.glob("damaged-*")):
            raise CheckpointError(
                f"no good checkpoint is left in {self._folder}; to start from the beginning remove "
                f"{', '.join(path.name for path in damaged)}, or choose another --workdir"
            )
        return None

    def restore(self, path: pathlib.Path, manifest: Manifest, item: str, target: Any) -> Any:
        """Arrays of a checkpoint in the structure, dtypes and shardings of an abstract `target`.

        Raises:
          CheckpointError: if they have other names, shapes or dtypes.
        """
        return _restore(path, manifest, item, target)

    def save(self, step: int, params: Any, opt_state: Any | None, data: Mapping[str, Any] | None) -> None:
        """Starts to save; the arrays may be donated as soon as this returns.

        Raises:
          CheckpointError: if this checkpoint, or the one before, could not be written.
        """
        self.wait()
        if self._manager is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(max_to_keep=None, create=False, enable_async_checkpointing=True)
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        items = {"params": _named(params)} | ({} if opt_state is None else {"optimizer": _named(opt_state)})
        arguments = ocp.args.Composite(**{item: ocp.args.StandardSave(arrays) for item, arrays in items.items()})
        number = step if data is not None else MODEL_ONLY_FOLDER
        if not self._manager.save(number, args=arguments):
            raise CheckpointError(f"{self._folder / str(number)} was not saved: is a later step there already?")
        manifest = Manifest(
            step=step,
            config=self._config,
            data=None if data is None else dict(data),
            versions=_versions(),
            arrays={item: _description(arrays) for item, arrays in items.items()},
            files={},
        )
        self._pending = self._background.submit(self._finish, self._folder / str(number), manifest)

    def wait(self) -> None:
        """Returns when what was being saved is complete.

        Raises:
          CheckpointError: if it could not be written.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Waits, and ends the threads."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            if self._manager is not None:
                self._manager.close()
                self._manager = None

    def _finish(self, path: pathlib.Path, manifest: Manifest) -> None:
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            if jax.process_index() == 0:
                files = sorted(file for file in path.rglob("*") if file.is_file())
                digests = {str(file.relative_to(path)): [file.stat().st_size, sha256(file)] for file in files}
                dataclasses.replace(manifest, files=digests).write(path)
                for old in _step_folders(self._folder)[self._config.training.checkpoints_to_keep :]:
                    shutil.rmtree(old)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} could not be written: {error}") from error
        self._report(f"saved {path}")

    def _remove_partial(self) -> None:
        for partial in self._folder.glob("*.orbax-checkpoint-tmp*"):
            self._report(f"removing {partial}, which was not finished")
            shutil.rmtree(partial)

    def _set_aside(self, path: pathlib.Path, error: CheckpointError) -> None:
        if not (path / MANIFEST_FILE).is_file():
            self._report(f"{error}; removing it")
            shutil.rmtree(path)
            return
        aside = path.with_name(f"damaged-{path.name}")
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)
        self._report(f"{error}; it is now {aside}")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model from a checkpoint."""

    config: Config  # that it was saved with
    model: LanguageModel
    step: int
    path: pathlib.Path  # of the checkpoint


def load_model(
    workdir: pathlib.Path | str,
    step: int | None = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
    report: Callable[[str], None] = print,
) -> LoadedModel:
    """The model of a run's newest good checkpoint, or of a certain step. Nothing in the workdir is changed.

    Args:
      workdir: of the run.
      step: None walks back from the newest checkpoint to the newest good one, reporting what is damaged.
      mesh: where the parameters go, cut as `rat_jax.sharding` says; None: the default device.
      report: is told of damaged checkpoints.

    Raises:
      CheckpointError: if the folder is missing or not a run's, or has no good checkpoint (of that step).
    """
    workdir = Workdir(pathlib.Path(workdir))
    workdir.require_run()
    folders = _step_folders(workdir.checkpoints.absolute())
    if step is not None:
        steps = [int(path.name) for path in folders]
        if step not in steps:
            raise CheckpointError(f"{workdir.path} has no checkpoint of step {step}; it has {sorted(steps) or 'none'}")
        folders = [path for path in folders if int(path.name) == step]
    for path in folders:
        try:
            manifest = Manifest.read(path)
            manifest.verify(path)
        except CheckpointError as error:
            if step is not None:
                raise
            report(f"{error}; trying the one before")
            continue
        graphdef, target = abstract_model(manifest.config.model)
        target = _placed(target, mesh)
        params = _restore(path, manifest, "params", target)
        return LoadedModel(manifest.config, nnx.merge(graphdef, params), manifest.step, path)
    raise CheckpointError(f"{workdir.path} has no {'good checkpoint' if folders else 'checkpoint yet'}")


def save_model(
    workdir: pathlib.Path | str, config: Config, model: LanguageModel, step: int, tokenizer: Tokenizer | None = None
) -> pathlib.Path:
    """Makes a workdir that holds a model only, from which training, evaluation and generation can start.

    Training takes the parameters, and starts with a new optimizer at the first step of its schedule.

    Args:
      workdir: a folder that is missing or empty.
      config: whose `model` part is the model's.
      model: its parameters are saved in float32.
      step: optimizer steps that the model was trained for, for information.
      tokenizer: of the model, saved in the workdir, if known.

    Returns:
      The checkpoint's folder.

    Raises:
      CheckpointError: if the folder is not empty, or the checkpoint cannot be written.
    """
    workdir = Workdir(pathlib.Path(workdir))
    if workdir.path.exists() and not (workdir.path.is_dir() and not any(workdir.path.iterdir())):
        raise CheckpointError(f"{workdir.path} is there already and not empty; it is left as it is")
    if config.model != model.config:
        raise CheckpointError("config.model is not the config of the model that is to be saved")
    workdir.mark(config)
    if tokenizer is not None:
        workdir.tokenizer.mkdir()
        tokenizer.save(workdir.tokenizer)
    checkpoints = Checkpoints(workdir, config, lambda message: None)
    try:
        checkpoints.save(step, nnx.state(model), None, None)
    finally:
        checkpoints.close()
    return workdir.checkpoints / str(MODEL_ONLY_FOLDER)


def abstract_model(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure of a model and the shapes of its parameters, without making them."""
    return nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))


def _placed(target: Any, mesh: jax.sharding.Mesh | None) -> Any:
    if mesh is None:
        places = jax.tree.map(lambda x: jax.sharding.SingleDeviceSharding(jax.devices()[0]), target)
    else:
        places = shardings(target, mesh)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), target, places)


def _restore(path: pathlib.Path, manifest: Manifest, item: str, target: Any) -> Any:
    wanted = _named(target)
    saved = manifest.arrays.get(item, {})
    here = _description(wanted)
    differing = [
        f"{name}: {saved.get(name)} there, {here.get(name)} here"
        for name in sorted({*saved, *here})
        if saved.get(name) != here.get(name)
    ]
    if differing:
        raise CheckpointError(f"{path / item} holds other arrays than this code makes: {'; '.join(differing[:5])}")
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(path / item, wanted)
    return jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in leaf_names(target)])


def _named(tree: Any) -> dict[str, Any]:
    names = leaf_names(tree)
    if len(set(names)) != len(names):
        raise ValueError("two arrays of a checkpoint have the same name")
    return dict(zip(names, jax.tree.leaves(tree), strict=True))


def _description(arrays: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: [list(x.shape), str(np.dtype(x.dtype))] for name, x in arrays.items()}


def _step_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """Newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if path.name.isdecimal()), key=lambda path: -int(path.name))


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "orbax-checkpoint": ocp.__version__,
    }
