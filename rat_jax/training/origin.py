"""What a new run starts from by `config.init`: a checkpoint, a folder of weights or a file of the PyTorch release.

All that the model has must be there; what is there and not used is named.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from rat_jax.checkpoints.arrays import named, restore_arrays
from rat_jax.checkpoints.store import find_checkpoint
from rat_jax.checkpoints.weights import Weights, is_weights
from rat_jax.checkpoints.workdir import CheckpointError, Workdir, check_same_model
from rat_jax.config import Config, InitConfig, ModelConfig
from rat_jax.files import system_errors
from rat_jax.paths import local_path
from rat_jax.release.file import read_release_file
from rat_jax.release.model_config import model_config_from_release
from rat_jax.release.weights import model_from_release
from rat_jax.training.step import TrainState

_FIELD = "config.init.path"
_ADVICE = f"Set it to what it is there, or name another {_FIELD}"
_SCHEDULE = "learning_rate"  # the part of the optimizer's state that begins anew


@dataclasses.dataclass(frozen=True)
class Names:
    """Arrays that were loaded, and the names of those that were not. Where one is missing, none is loaded."""

    num_loaded: int
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        unused = f" ({', '.join(self.unused)})" if self.unused else ""
        return f"{self.num_loaded} arrays loaded, 0 missing, {len(self.unused)} unused{unused}"

    def as_json(self) -> dict[str, Any]:
        """For `run.json`."""
        return {"loaded": self.num_loaded, "missing": 0, "unused": list(self.unused)}


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run begins with, and what its workdir notes of it."""

    params: nnx.State
    opt_state: Any | None  # None: the optimizer starts anew
    note: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Origin:
    """Something to start from that was found to hold the model; nothing large is loaded of it yet."""

    kind: str
    path: pathlib.Path  # of the checkpoint, folder or file
    step: int  # that the model was trained for
    model: ModelConfig
    tokenizer: pathlib.Path | None  # a folder, which need not be there
    # Arrays in the structure and shardings of an abstract tree.
    read_params: Callable[[Any], tuple[Any, Names]]
    read_opt_state: Callable[[Any], tuple[Any, Names]] | None  # None: it has none

    def load(self, target: TrainState, init: InitConfig, say: Callable[[str], None]) -> Start:
        """Loads what `init` asks for, and says the names that were found.

        Args:
          target: `rat_jax.training.step.abstract_state`.
          init: of the run.
          say: is told.

        Raises:
          CheckpointError, ReleaseError: if arrays are missing, of other shapes or damaged.
          FileError: if the system refuses.
        """
        params, names = self.read_params(target.params)
        say(f"starting from the model of step {self.step} in {self.path}: {names}")
        note = {"kind": self.kind, "path": str(self.path), "step": self.step, "params": names.as_json()}
        if self.read_opt_state is None or not init.optimizer:
            say("the optimizer starts anew")
            return Start(params, None, note | {"optimizer": None})
        opt_state, names = self.read_opt_state(target.opt_state)
        say(f"the optimizer resumes from its state there: {names}; the schedule begins anew")
        return Start(params, opt_state, note | {"optimizer": names.as_json()})


def open_origin(config: Config, say: Callable[[str], None]) -> Origin | None:
    """What `config.init` names; None: nothing. All hosts must call this together.

    Raises:
      CheckpointError, ReleaseError, ConfigError: if it is not there, damaged, holds another model than the config's
        (dtype, remat and scan_unroll may differ), or has no step or optimizer's state where one is asked for.
      FileError: if the system refuses.
    """
    init = config.init
    if init.path is None:
        return None
    path = local_path(init.path, _FIELD)
    with system_errors(path, "read"):
        is_file, is_folder = path.is_file(), path.is_dir()
        is_run = is_folder and Workdir(path).run_file.exists()
        has_weights = is_folder and is_weights(path)
    if init.step is not None and not is_run:
        raise CheckpointError(f"config.init.step is {init.step}, and {_FIELD} is {str(path)!r}, which is no workdir")
    if is_run:
        origin = _open_run(path, init.step, say)
    elif has_weights:
        origin = _open_weights(path)
    elif is_file:
        origin = _open_release(path, config.model)
    else:
        what = "is no workdir and no folder of safetensors files" if is_folder else "is not there"
        raise CheckpointError(f"{_FIELD} is {str(path)!r}, which {what}")
    if init.optimizer and origin.read_opt_state is None:
        raise CheckpointError(f"{origin.path} holds no optimizer's state: set config.init.optimizer to False")
    check_same_model(origin.model, config.model, origin.path, _ADVICE)
    return origin


def _open_run(path: pathlib.Path, step: int | None, say: Callable[[str], None]) -> Origin:
    place, manifest = find_checkpoint(path, step, say)

    def read(item: str, target: Any) -> Any:
        return restore_arrays(place / item, manifest.arrays[item], target)

    def read_params(target: Any) -> tuple[Any, Names]:
        return read("params", target), Names(len(manifest.arrays["params"]))

    def read_opt_state(target: Any) -> tuple[Any, Names]:
        opt_state = read("optimizer", target)
        schedule = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), opt_state[_SCHEDULE])
        unused = tuple(f"{_SCHEDULE}.{name}" for name in named(schedule))
        names = Names(len(manifest.arrays["optimizer"]) - len(unused), unused)
        return opt_state | {_SCHEDULE: schedule}, names

    return Origin(
        kind="checkpoint",
        path=place,
        step=manifest.step,
        model=manifest.config.model,
        tokenizer=Workdir(path).tokenizer,
        read_params=read_params,
        read_opt_state=None if manifest.data is None else read_opt_state,
    )


def _open_weights(path: pathlib.Path) -> Origin:
    weights = Weights.open(path)

    def read_params(target: Any) -> tuple[Any, Names]:
        arrays = weights.read()
        return _place(arrays, target), Names(len(arrays))

    return Origin("weights", path, weights.step, weights.config.model, weights.tokenizer, read_params, None)


def _open_release(path: pathlib.Path, model: ModelConfig) -> Origin:
    file = read_release_file(path)

    def read_params(target: Any) -> tuple[Any, Names]:
        arrays = named(nnx.state(model_from_release(file.state_dict, file.model_config, model.dtype)))
        return _place(arrays, target), Names(len(file.state_dict))

    there = model_config_from_release(file.model_config, model.dtype)
    return Origin("release", path, file.step, there, None, read_params, None)


def _place(arrays: Mapping[str, Any], target: Any) -> Any:
    """Arrays of this host, which has all of each, where an abstract tree says."""

    def place(name: str, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        array = np.asarray(arrays[name])
        return jax.make_array_from_callback(wanted.shape, wanted.sharding, lambda index: array[index])

    leaves = [place(name, wanted) for name, wanted in named(target).items()]
    return jax.tree.unflatten(jax.tree.structure(target), leaves)
