"""The files of an evaluation: each measurement has its own, so that no result replaces another one's."""

import hashlib
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from rat_jax.checkpoints.store import LoadedModel
from rat_jax.data.corpus import Corpus
from rat_jax.evaluation.perplexity import Evaluation

_MAX_NAME = 40  # characters of a corpus, and of lengths, in the name of a file


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
    measured = json.dumps([results["data_hash"], lengths, fractions])
    digest = hashlib.sha256(measured.encode()).hexdigest()[:8]
    corpus = re.sub(r"[^A-Za-z0-9._]", "_", pathlib.Path(results["data_path"]).name)[:_MAX_NAME]
    named = "_".join(map(str, lengths))
    if len(named) > _MAX_NAME:
        named = f"{lengths[0]}_to_{lengths[-1]}"
    return folder / f"evaluation-{results['step']}-{corpus}-{named}-{digest}"
