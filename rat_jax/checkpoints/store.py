"""Checkpoints: complete, verified and of one format, however the process that wrote them ended.

WORKDIR/checkpoints/STEP/
  params/          the model's parameters, by name
  optimizer/       the optimizer's state, by name; not there where only a model was saved
  manifest.json    written last: config, position of the data, versions, arrays, sizes and SHA-256 of all other files
"""

import concurrent.futures
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from rat_jax.checkpoints.arrays import (
    ArrayWriter,
    description,
    named,
    restore_arrays,
    write_errors,
)
from rat_jax.checkpoints.digests import all_digests, tell_own_digests
from rat_jax.checkpoints.folder import aside, check_way, clean, remove_old, set_aside, step_folders
from rat_jax.checkpoints.hosts import forget, hear, on_first_host, tell, tell_error
from rat_jax.checkpoints.manifest import Manifest, VersionError, from_first_host, versions_here
from rat_jax.checkpoints.owner import Owner
from rat_jax.checkpoints.run_log import read_log
from rat_jax.checkpoints.workdir import CheckpointError, Workdir
from rat_jax.config import Config, ModelConfig
from rat_jax.files import FileError
from rat_jax.model import LanguageModel
from rat_jax.paths import local_path
from rat_jax.sharding import shardings

__all__ = ["CheckpointError", "Checkpoints", "LoadedModel", "Manifest", "load_model"]

T = TypeVar("T")
_serials = itertools.count()  # of those made in this process: what its hosts tell each other is under a name of its own


class Checkpoints:
    """The checkpoints of a run: saved in the background, the newest `keep` of them kept."""

    def __init__(self, workdir: Workdir, config: Config, report: Callable[[str], None], owner: Owner | None = None):
        """Touches nothing yet.

        Args:
          workdir: of the run.
          config: of the run, saved with each checkpoint.
          report: is told what was saved, found damaged or removed.
          owner: this process as the workdir's, looked at before and after a save; None on hosts other than the first.
        """
        self._workdir = workdir
        self._folder = workdir.checkpoints.absolute()
        self._config = config
        self._report = report
        self._owner = owner
        self._saved_step: int | None = None
        self._writer: ArrayWriter | None = None
        self._background = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._serial, self._save_serials = next(_serials), itertools.count()
        self._told: str | None = None  # the key of the save before

    @property
    def saved_step(self) -> int | None:
        """The newest step whose checkpoint is known to be complete; 0: a model alone; None: none."""
        return self._saved_step

    def peek(self) -> Manifest | None:
        """The newest manifest that can be read, its files not looked at; None if there is none.

        All hosts must call this together.

        Raises:
          VersionError: if another version of the code wrote it.
          CheckpointError: if the workdir is no run's.
        """
        found = from_first_host(self._folder, self._newest)
        return None if found is None else found[1]

    def _newest(self) -> tuple[pathlib.Path, Manifest] | None:
        if self._workdir.is_new():
            return None
        for path in step_folders(self._folder):
            try:
                return path, Manifest.read(path)
            except VersionError:
                raise
            except CheckpointError:  # `latest` reports it
                continue
        return None

    def latest(self) -> tuple[pathlib.Path, Manifest] | None:
        """The newest checkpoint whose files are all as they were written, or None where nothing was saved yet.

        What is newer is reported and set aside, so that its step can be saved again: as `unfinished-STEP` if it has no
        manifest, else as `damaged-STEP`. All hosts must call this together.

        Raises:
          CheckpointError: if no good one is left of a run that saved some, or another version of the code wrote one.
          FileError: if the system refuses to read or move one.
        """
        on_first_host(self._clean)
        while (found := from_first_host(self._folder, self._newest_complete)) is not None:
            path, manifest = found
            try:
                manifest.verify_together(path)
            except CheckpointError as damage:
                on_first_host(lambda path=path, damage=damage: self._set_aside(path, damage))
                continue
            on_first_host(lambda step=int(path.name): check_way(self._folder, step))
            self._saved_step = int(manifest.folder)
            return found
        return None

    def restore(self, path: pathlib.Path, manifest: Manifest, item: str, target: Any) -> Any:
        """Arrays of a checkpoint in the structure, dtypes and shardings of an abstract `target`.

        Raises:
          CheckpointError: if they have other names, shapes or dtypes, or cannot be read.
        """
        return restore_arrays(path / item, manifest.arrays.get(item, {}), target)

    def save(self, step: int, params: Any, opt_state: Any | None, data: Mapping[str, Any] | None) -> None:
        """Starts to save; the arrays may be donated as soon as this returns.

        Args:
          step: optimizer steps done.
          params: the model's.
          opt_state: the optimizer's; None: a model alone.
          data: `TrainData.state`; None: a model alone.

        Raises:
          CheckpointError: if this checkpoint, or the one before, could not be written.
          FileError: if the one before was, and the system refused to note it in `run.json`.
          HeldError: if another process has taken the workdir.
        """
        self.wait()
        if self._owner is not None:
            self._owner.check()
        items = {"params": named(params)} | ({} if opt_state is None else {"optimizer": named(opt_state)})
        manifest = Manifest(
            step=step,
            config=self._config,
            data=None if data is None else dict(data),
            versions=versions_here(),
            arrays={item: description(arrays) for item, arrays in items.items()},
            files={},
        )
        path = self._folder / manifest.folder
        if later := [other.name for other in step_folders(self._folder) if int(other.name) >= int(manifest.folder)]:
            raise CheckpointError(f"{path} was not saved: {self._folder / later[0]} is there already")
        with write_errors(path):
            self._folder.mkdir(exist_ok=True)
        if self._writer is None:
            self._writer = ArrayWriter()
        self._writer.start(path, items)
        key = f"rat_jax/checkpoints/{self._serial}/{next(self._save_serials)}"
        self._pending = self._background.submit(self._finish, path, manifest, key)

    def wait(self) -> None:
        """Returns when what was being saved is complete.

        Raises:
          CheckpointError: if it could not be written.
          FileError: if it was, and the system refused to note it in `run.json`.
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
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def _finish(self, path: pathlib.Path, manifest: Manifest, key: str) -> None:
        """Completes what was written, in the background: on all hosts, or on none."""
        if jax.process_index() != 0:
            self._finish_with_first(path, manifest, key)
        elif jax.process_count() == 1:
            self._finish_first(path, manifest, key)
        else:
            try:
                self._finish_first(path, manifest, key)
            except (CheckpointError, FileError) as error:
                tell_error(f"{key}/done", error)
                raise
            tell(f"{key}/done", None)

    def _finish_first(self, path: pathlib.Path, manifest: Manifest, key: str) -> None:
        self._writer.wait(path)
        with write_errors(path):
            files = all_digests(path, key)
            if self._told is not None:  # before those of this step
                forget(self._told)
            self._told = key
            if self._owner is not None:
                self._owner.check()
            dataclasses.replace(manifest, files=files).write(path)
        self._saved_step = int(manifest.folder)  # it is complete, whatever becomes of the note
        self._report(f"saved {path}")
        self._workdir.note_saved(int(manifest.folder))
        remove_old(self._folder, self._config.training.checkpoints_to_keep, self._report)

    def _finish_with_first(self, path: pathlib.Path, manifest: Manifest, key: str) -> None:
        try:
            self._writer.wait(path)
            with write_errors(path):
                tell_own_digests(path, key)
        except CheckpointError as error:
            tell_error(f"{key}/{jax.process_index()}", error)
            raise
        hear(f"{key}/done", 0)
        self._saved_step = int(manifest.folder)

    def _clean(self) -> None:
        if not self._workdir.is_new():
            clean(self._folder, self._report)

    def _newest_complete(self) -> tuple[pathlib.Path, Manifest] | None:
        """The newest checkpoint with a good manifest, its files not looked at; what is newer is set aside."""
        if self._workdir.is_new():
            return None
        for path in step_folders(self._folder):
            try:
                return path, Manifest.read(path)
            except VersionError:  # not to be set aside: it is good for other code
                raise
            except CheckpointError as error:
                self._set_aside(path, error)
        check_way(self._folder, -1)
        self._refuse_to_start_over()
        return None

    def _set_aside(self, path: pathlib.Path, damage: CheckpointError) -> None:
        self._report(f"{damage}; it is now {set_aside(path)}")

    def _refuse_to_start_over(self) -> None:
        """Of a run that has no good checkpoint: refuses if it had one."""
        record = self._workdir.record()
        unusable = aside(self._folder)
        if record.notes_saves:
            was_saved = record.saved_step is not None
        else:  # the second save waits for the first to be complete, so that a log beyond it knows
            steps = [line["step"] for line in read_log(self._workdir.log_file)]
            every = record.checkpoint_every_steps
            was_saved = bool(unusable) or (every is not None and max(steps, default=0) > 2 * every)
        if not was_saved:
            return
        what = {None: "some were saved", 0: "a model was saved"}.get(record.saved_step, f"step {record.saved_step} was")
        there = f" ({', '.join(unusable)} cannot be used)" if unusable else ""
        raise CheckpointError(
            f"no good checkpoint is left in {self._folder}{there}, though {what}; nothing is started over. Put a copy "
            f"of one back there; or, to start from the beginning, move {self._workdir.path} away or choose another "
            f"--workdir"
        )


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model from a checkpoint."""

    config: Config  # that it was saved with
    model: LanguageModel
    step: int
    path: pathlib.Path  # of the checkpoint
    mesh: jax.sharding.Mesh | None = None  # that its parameters are on


def load_model(
    workdir: pathlib.Path | str,
    step: int | None = None,
    *,
    mesh: jax.sharding.Mesh | Callable[[ModelConfig], jax.sharding.Mesh | None] | None = None,
    report: Callable[[str], None] = print,
) -> LoadedModel:
    """The model of a run's newest good checkpoint, or of a certain step. Nothing in the workdir is changed.

    Several hosts, which must call this together, load the one that the first host finds.

    Args:
      workdir: of the run.
      step: None walks back from the newest checkpoint to the newest good one, reporting what is damaged.
      mesh: where the parameters go, cut as `rat_jax.sharding` says, or what gives it for a model; None: the default
        device.
      report: is told of damaged checkpoints.

    Raises:
      CheckpointError: if the folder is missing or not a run's, or has no good checkpoint (of that step).
    """

    def load(path: pathlib.Path, manifest: Manifest) -> LoadedModel:
        graphdef, target = abstract_model(manifest.config.model)
        is_mesh = mesh is None or isinstance(mesh, jax.sharding.Mesh)  # which can be called, too
        where = mesh if is_mesh else mesh(manifest.config.model)
        params = restore_arrays(path / "params", manifest.arrays["params"], _placed(target, where))
        return LoadedModel(manifest.config, nnx.merge(graphdef, params), manifest.step, path, where)

    if jax.process_count() > 1:
        return load(*find_checkpoint(workdir, step, report))
    return _walk(Workdir(local_path(workdir, "workdir")), step, report, load)


def find_checkpoint(
    workdir: pathlib.Path | str, step: int | None, report: Callable[[str], None]
) -> tuple[pathlib.Path, Manifest]:
    """A run's newest good checkpoint, or that of a certain step, as of `load_model`. All hosts must call this together.

    Raises:
      CheckpointError: as `load_model`.
    """
    workdir = Workdir(local_path(workdir, "workdir"))
    return from_first_host(workdir.checkpoints, lambda: _walk(workdir, step, report, lambda *found: found))


def _walk(
    workdir: Workdir, step: int | None, report: Callable[[str], None], use: Callable[[pathlib.Path, Manifest], T]
) -> T:
    """What `use` makes of the newest good checkpoint, or of that of a certain step."""
    workdir.require_run()
    folder = workdir.checkpoints
    while True:  # a run that goes on meanwhile adds and removes checkpoints
        folders = step_folders(folder)
        if step is not None and step not in (steps := sorted(int(path.name) for path in folders)):
            raise CheckpointError(f"{workdir.path} has no checkpoint of step {step}; it has {steps or 'none'}")
        for path in folders if step is None else [folder / str(step)]:
            try:
                return use(path, _good(path))
            except (CheckpointError, FileError) as error:
                if not path.is_dir():
                    report(f"{path} was removed while it was read: its run goes on; looking again")
                    break
                if step is not None or not isinstance(error, _UnusableError):
                    raise
                report(f"{error}; trying the one before")
        else:
            raise CheckpointError(f"{workdir.path} has no {'good checkpoint' if folders else 'checkpoint yet'}")


class _UnusableError(CheckpointError):
    """A checkpoint that is damaged or was not finished."""


def _good(path: pathlib.Path) -> Manifest:
    """The manifest of a checkpoint that has all its files, and the parameters as they were written.

    The optimizer's state, two thirds of the bytes, is not read, as those who ask for a model do not.
    """
    try:
        manifest = Manifest.read(path)
        manifest.verify(path, unread=("optimizer",))
    except CheckpointError as error:
        raise _UnusableError(str(error)) from None
    return manifest


def abstract_model(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure of a model and the shapes of its parameters, without making them."""
    return nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))


def _placed(target: Any, mesh: jax.sharding.Mesh | None) -> Any:
    if mesh is None:
        places = jax.tree.map(lambda x: jax.sharding.SingleDeviceSharding(jax.devices()[0]), target)
    else:
        places = shardings(target, mesh)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), target, places)
