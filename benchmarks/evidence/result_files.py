"""The files in which `run_model.py` and `run_speeds.py` leave what they measured."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.evidence.studies import KINDS, Model
from rat_jax.data import DataError
from rat_jax.data.json_object import LARGEST, build_known, require
from rat_jax.errors import RatJaxError, shown
from rat_jax.files import ContentError, read_object


@dataclasses.dataclass(frozen=True)
class LengthLosses:
    """Losses of a validation split that was read in sequences of one length."""

    loss: float  # nats a token
    loss_by_octave: list[list[float]]  # first positions of octaves, and mean losses there
    document_losses: list[float]  # sums over each document's targets, in nats, in the split's order


@dataclasses.dataclass(frozen=True)
class ModelResult:
    """A trained model: what `measurement.measure` gives of it, and what it took."""

    kind: str
    seed: int
    seconds: float
    parameters: int
    device: str
    jax: str
    training_tokens: int
    validation_losses: list[list[float]]  # steps, and losses there
    document_targets: list[int]  # of the validation split, in its order
    seq_len: int  # of the training
    num_steps: int
    lengths: Mapping[int, LengthLosses]  # by tokens of a sequence


@dataclasses.dataclass(frozen=True)
class Failure:
    """A model that has no losses."""

    kind: str
    seed: int
    failed: str  # why


@dataclasses.dataclass(frozen=True)
class Speed:
    """Of a kind's training steps."""

    kind: str
    tokens_per_second: float


def result_file(out: pathlib.Path, model: Model) -> pathlib.Path:
    """Where a model's result is written."""
    return out / "results" / f"{model.name}.json"


def speed_file(out: pathlib.Path, kind: str) -> pathlib.Path:
    """Where the speed of a kind's training is written."""
    return out / "speeds" / f"{kind}.json"


def read_result(file: pathlib.Path) -> ModelResult | Failure:
    """The result of a model.

    Raises:
      RatJaxError: if the file is damaged or lacks a figure; the message says how it is made again.
      FileError: if the system refuses it.
    """
    with _made_again_by(file, "run_studies"):
        values = read_object(file)
        result = build_known(Failure, values, str(file)) if "failed" in values else _model_result(values, str(file))
        _check_name(file, result.kind, Model(result.kind, result.seed).name)
    return result


def read_speed(file: pathlib.Path) -> Speed:
    """The speed of a kind; errors as of `read_result`."""
    with _made_again_by(file, "run_speeds"):
        speed = build_known(Speed, read_object(file), str(file))
        _check_name(file, speed.kind, speed.kind)
        require(speed.tokens_per_second > 0, str(file), f"tokens_per_second is {speed.tokens_per_second}")
    return speed


@contextlib.contextmanager
def _made_again_by(file: pathlib.Path, program: str) -> Iterator[None]:
    try:
        yield
    except (ContentError, DataError) as error:
        command = f"python -m benchmarks.evidence.{program} --out {file.parent.parent}"
        raise RatJaxError(f"{error}; delete it and give its command again, {command} with the flags it had") from None


def _check_name(file: pathlib.Path, kind: str, name: str) -> None:
    """Results are told apart by their names: a copy under another one would count twice."""
    require(kind in KINDS, str(file), f"kind is {shown(kind)}, which no study has")
    require(file.stem == name, str(file), f"what it holds belongs into {name}.json")


def _model_result(values: dict[str, Any], name: str) -> ModelResult:
    of_config = {"seq_len": _at(values, "config.data.seq_len", name)}
    of_config["num_steps"] = _at(values, "config.training.num_steps", name)
    result = build_known(ModelResult, values | of_config, name)
    for field in ("parameters", "training_tokens", "seq_len", "num_steps"):
        require(0 < getattr(result, field) < LARGEST, name, f"{field} is {shown(getattr(result, field))}")
    require(result.seconds >= 0, name, f"seconds is {result.seconds}")
    require(all(0 <= count < LARGEST for count in result.document_targets), name, "document_targets are no counts")
    require(sum(result.document_targets) > 0, name, "document_targets are none")
    require(all(len(row) == 2 for row in result.validation_losses), name, "validation_losses are not two a row")
    lengths = {
        _tokens(key, name): _length_losses(result, found, f"{name}, lengths {key[:15]},")
        for key, found in result.lengths.items()
    }
    require(result.seq_len in lengths, name, f"lengths have no {result.seq_len}, which is that of the training")
    return dataclasses.replace(result, lengths=lengths)


def _length_losses(result: ModelResult, found: Any, name: str) -> LengthLosses:
    losses = build_known(LengthLosses, found, name)
    require(all(len(row) == 2 for row in losses.loss_by_octave), name, "loss_by_octave is not two a row")
    there, wanted = len(losses.document_losses), len(result.document_targets)
    require(there == wanted, name, f"document_losses are {there}, document_targets {wanted}")
    return losses


def _at(values: Any, path: str, name: str) -> Any:
    """What is at a path of keys in objects in objects."""
    for key in path.split("."):
        require(isinstance(values, dict) and key in values, name, f"it has no {path}")
        values = values[key]
    return values


def _tokens(key: str, name: str) -> int:
    require(key.isascii() and key.isdecimal() and len(key) < 16, name, f"{shown(key)} is no length of sequences")
    return int(key)
