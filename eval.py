"""Evaluates a trained model on the validation split: loss, perplexity, bits a byte, and the loss by position.

  python eval.py --workdir=runs/default
  python eval.py --workdir=runs/default --context_lengths=256,512,1024

Prints a table, then writes it into the workdir, as evaluation-STEP-CORPUS-LENGTHS-DIGEST.json and .png: results of
other data, lengths or parts of the split have files of their own. Exit codes: 0; 2 if flags, the workdir, its
checkpoint or the data do not fit; 1 if a later length failed or a file could not be written, after what was computed
is printed.
"""

from rat_jax import interrupts

if __name__ == "__main__":
    interrupts.exit_while_importing()

import json
import pathlib
import sys
from collections.abc import Iterable, Sequence

import tqdm
from absl import flags

from rat_jax import program
from rat_jax.checkpoints import LoadedModel, Workdir, load_model
from rat_jax.config import MeshConfig
from rat_jax.data.corpus import Corpus
from rat_jax.data.pipeline import Batch
from rat_jax.errors import RatJaxError, RunStopped
from rat_jax.evaluation import results
from rat_jax.evaluation.perplexity import Evaluation, EvaluationError, check_fits, evaluate
from rat_jax.evaluation.report import plot, table
from rat_jax.files import FileError, write_json
from rat_jax.paths import local_path
from rat_jax.sharding import make_mesh

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
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


def _context_lengths() -> list[int]:
    try:
        return sorted({int(length) for length in _CONTEXT_LENGTHS.value or []})
    except ValueError as error:
        raise EvaluationError(f"--context_lengths wants numbers with commas between: {error}") from None


def _open_corpus(loaded: LoadedModel, workdir: Workdir) -> Corpus:
    path = local_path(_DATA_PATH.value or loaded.config.data.path, "--data_path")
    if _DATA_PATH.value is None and not path.exists():
        raise EvaluationError(f"{path}, which the model was trained on, is not there: name a corpus with --data_path")
    corpus = Corpus.open(path)
    corpus.check_tokenizer(workdir.tokenizer)
    return corpus


def _progress(batches: Iterable[Batch], num_batches: int) -> Iterable[Batch]:
    return tqdm.tqdm(batches, total=num_batches, unit="batch", disable=not sys.stderr.isatty(), leave=False)


def _give_out(loaded: LoadedModel, corpus: Corpus, evaluations: Sequence[Evaluation], folder: pathlib.Path) -> None:
    """Prints, then writes.

    Raises:
      RunStopped: if a file could not be written.
    """
    values = results.as_json(loaded, corpus, evaluations)
    print(json.dumps(values) if _JSON.value else table(evaluations), flush=True)
    path = results.results_path(folder, values)
    json_file, picture = pathlib.Path(f"{path}.json"), pathlib.Path(f"{path}.png")
    try:
        write_json(json_file, values)
        plot(evaluations, picture, trained_length=loaded.config.data.seq_len)
    except FileError as error:
        raise RunStopped(str(error)) from None
    print(f"written to {json_file} and {picture}", file=sys.stderr)


def main() -> None:
    lengths = _context_lengths()
    workdir = Workdir(local_path(_WORKDIR.value, "--workdir"))
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1))
    loaded = load_model(workdir.path, _STEP.value, mesh=mesh, report=lambda line: print(line, file=sys.stderr))
    corpus = _open_corpus(loaded, workdir)
    lengths = lengths or [loaded.config.data.seq_len]
    for length in lengths:
        check_fits(loaded, corpus, mesh, length, _BATCH_TOKENS.value)
    settings = {"batch_tokens": _BATCH_TOKENS.value, "max_batches": _MAX_BATCHES.value, "progress": _progress}
    evaluations: list[Evaluation] = []
    try:
        for length in lengths:
            evaluations.append(evaluate(loaded, corpus, mesh, length, **settings))
    except (RatJaxError, KeyboardInterrupt) as error:
        if not evaluations:
            raise
        _give_out(loaded, corpus, evaluations, workdir.path)
        what = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        raise RunStopped(f"only the context lengths above are done: {what}") from None
    _give_out(loaded, corpus, evaluations, workdir.path)


if __name__ == "__main__":
    program.run(main, required=["workdir"])
