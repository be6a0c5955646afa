"""Evaluates a trained model on the validation split: loss, perplexity, bits a byte, and the loss by position.

  python eval.py --workdir=runs/default
  python eval.py --workdir=runs/default --context_lengths=256,512,1024

Prints a table and writes it as evaluation-STEP.json and evaluation-STEP.png into the workdir. Exit codes: 0; 2 if the
workdir, its checkpoint or the data do not fit.
"""

import json
import pathlib
import sys
from collections.abc import Iterable

import tqdm
from absl import app, flags, logging

from rat_jax.checkpoints import LoadedModel, Workdir, load_model
from rat_jax.config import MeshConfig
from rat_jax.data.corpus import Corpus
from rat_jax.data.pipeline import Batch
from rat_jax.errors import RatJaxError
from rat_jax.evaluation.perplexity import EvaluationError, evaluate, plot, table
from rat_jax.files import write_json
from rat_jax.sharding import make_mesh

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
_STEP = flags.DEFINE_integer("step", None, "evaluate the checkpoint of this step; left out: the newest")
_DATA_PATH = flags.DEFINE_string("data_path", None, "prepared corpus; left out: the one that was trained on")
_CONTEXT_LENGTHS = flags.DEFINE_list(
    "context_lengths", None, "tokens of a sequence, one or several lengths; left out: data.seq_len of the training"
)
_MAX_BATCHES = flags.DEFINE_integer(
    "max_batches", None, "batches of each context length, evenly spread over the split; left out: the whole split"
)
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 16_384, "tokens computed at a time, over all devices")
_JSON = flags.DEFINE_bool("json", False, "print JSON instead of the table")


def _context_lengths(loaded: LoadedModel) -> list[int]:
    try:
        return sorted({int(length) for length in _CONTEXT_LENGTHS.value or [loaded.config.data.seq_len]})
    except ValueError as error:
        raise EvaluationError(f"--context_lengths wants numbers with commas between: {error}") from None


def _progress(batches: Iterable[Batch], num_batches: int) -> Iterable[Batch]:
    return tqdm.tqdm(batches, total=num_batches, unit="batch", disable=not sys.stderr.isatty(), leave=False)


def _evaluate() -> None:
    workdir = Workdir(pathlib.Path(_WORKDIR.value))
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1))
    loaded = load_model(workdir.path, _STEP.value, mesh=mesh, report=lambda line: print(line, file=sys.stderr))
    corpus = Corpus.open(_DATA_PATH.value or loaded.config.data.path)
    corpus.check_tokenizer(workdir.tokenizer)
    settings = {"batch_tokens": _BATCH_TOKENS.value, "max_batches": _MAX_BATCHES.value, "progress": _progress}
    evaluations = [evaluate(loaded, corpus, mesh, length, **settings) for length in _context_lengths(loaded)]

    results = {
        "checkpoint": str(loaded.path),
        "step": loaded.step,
        "data_path": str(corpus.path),
        "trained_length": loaded.config.data.seq_len,
        "evaluations": [evaluation.as_json() for evaluation in evaluations],
    }
    out = workdir.path / f"evaluation-{loaded.step}"
    write_json(out.with_suffix(".json"), results)
    plot(evaluations, out.with_suffix(".png"), trained_length=loaded.config.data.seq_len)
    print(json.dumps(results) if _JSON.value else table(evaluations))
    print(f"written to {out}.json and {out}.png", file=sys.stderr)


def main(arguments: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax reports each step of a restore
    try:
        if len(arguments) > 1:
            raise EvaluationError(f"{arguments[1]!r} is no flag")
        _evaluate()
    except RatJaxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main)
