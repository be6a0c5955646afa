"""The files of an evaluation: each measurement has its own, so that no result replaces another one's."""

import hashlib
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from rat_jax.checkpoints.store import LoadedModel
from rat_jax.config import config_to_dict
from rat_jax.data.corpus import Corpus
from rat_jax.evaluation.length_generalization import LengthGeneralization
from rat_jax.evaluation.perplexity import Evaluation
from rat_jax.files import read_object

LENGTHS_PREFIX = "length_generalization"  # of files
_MAX_NAME = 40  # characters of a corpus, of lengths, and of tasks, in the name of a file


def of_checkpoint(loaded: LoadedModel) -> dict[str, Any]:
    """Which checkpoint results are of."""
    return {"checkpoint": str(loaded.path), "step": loaded.step, "trained_length": loaded.config.data.seq_len}


def as_json(loaded: LoadedModel, corpus: Corpus, evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """What was measured and all figures, as values that JSON can hold."""
    return {
        "checkpoint": str(loaded.path),
        "step": loaded.step,
        "data_path": str(corpus.path),
        "data_hash": corpus.token_file("validation").header.content_hash,
        "trained_length": loaded.config.data.seq_len,
        "evaluations": [evaluation.as_json() for evaluation in evaluations],
    }


def results_path(folder: pathlib.Path, results: dict[str, Any]) -> pathlib.Path:
    """Where results belong, without a suffix: evaluation-STEP-CORPUS-LENGTHS-DIGEST.

    The digest is of the tokens, the lengths and the parts of the split, so that only the same measurement of the same
    checkpoint has the same name.
    """
    lengths = [evaluation["context_length"] for evaluation in results["evaluations"]]
    fractions = [evaluation["split_fraction"] for evaluation in results["evaluations"]]
    named_by = digest([results["data_hash"], lengths, fractions])
    corpus = part_of_a_name(pathlib.Path(results["data_path"]).name)
    named = "_".join(map(str, lengths))
    if len(named) > _MAX_NAME:
        named = f"{lengths[0]}_to_{lengths[-1]}"
    return folder / f"evaluation-{results['step']}-{corpus}-{named}-{named_by}"


def lengths_as_json(loaded: LoadedModel, corpus: Corpus, measured: LengthGeneralization) -> dict[str, Any]:
    """As `as_json`, of losses beyond the training length; with the run's name and its mixers, for labels."""
    config = config_to_dict(loaded.config.model)
    return {
        "run": loaded.path.parents[1].name,
        "checkpoint": str(loaded.path),
        "step": loaded.step,
        "data_path": str(corpus.path),
        "data_hash": corpus.token_file("validation").header.content_hash,
        "mixers": {name: config[name] for name in loaded.config.model.pattern},
        **measured.as_json(),
    }


def lengths_path(folder: pathlib.Path, results: dict[str, Any]) -> pathlib.Path:
    """Where they belong, without a suffix: length_generalization-STEP-CORPUS-LENGTH-DIGEST, as `results_path`."""
    named_by = digest([results["data_hash"], results["context_length"], results["split_fraction"]])
    corpus = part_of_a_name(pathlib.Path(results["data_path"]).name)
    return folder / f"{LENGTHS_PREFIX}-{results['step']}-{corpus}-{results['context_length']}-{named_by}"


def tasks_as_json(loaded: LoadedModel, measured: dict[str, Any], tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Results of tasks by name, and all that they depend on: the checkpoint and what `measured` says."""
    return {
        **of_checkpoint(loaded),
        "measured": measured,
        "tasks": tasks,
    }


def earlier_entries(path: pathlib.Path, key: str) -> Any:
    """What the file of an earlier command with the same settings holds under a key; None if there is no such file.

    Raises:
      FileError: if the system refuses to read it.
      ContentError: if it is damaged.
    """
    return read_object(path).get(key) if path.exists() else None


def tasks_path(
    folder: pathlib.Path, step: int, names: Sequence[str], measured: dict[str, Any], kind: str = "tasks"
) -> pathlib.Path:
    """Where results of tasks belong: KIND-STEP-NAMES-DIGEST.json; the digest is of the names and `measured`."""
    named_by = digest([list(names), measured])
    return folder / f"{kind}-{step}-{part_of_a_name('_'.join(names))}-{named_by}.json"


def digest(measured: Any) -> str:
    """What tells measurements apart in the name of a file: eight digits of the SHA-256 of their settings as JSON."""
    return hashlib.sha256(json.dumps(measured).encode()).hexdigest()[:8]


def part_of_a_name(text: str) -> str:
    """A text as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._]", "_", text)[:_MAX_NAME]
