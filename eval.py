"""Evaluates a trained model on the validation split: loss, perplexity, bits a byte, and the loss by position.

  python eval.py --workdir=runs/default
  python eval.py --workdir=runs/default --context_lengths=256,512,1024

Prints a table, then writes it into the workdir, as evaluation-STEP-CORPUS-LENGTHS-DIGEST.json and .png: results of
other data, lengths or parts of the split have files of their own. Exit codes: 0; 2 if flags, the workdir, its
checkpoint or the data do not fit; 1 if a later length failed, a signal came after the first, or a file could not be
written, after what was computed is printed; 75 if a signal came before.

Or at positions up to so many times the training length, in chunks, with the mixers' caches:

  python eval.py --workdir=runs/default --length_generalization=8

Or on tasks of the lm-evaluation-harness (pip install -r requirements-eval.txt), and on task files of your own:

  python eval.py --workdir=runs/default --tasks=arc_easy,hellaswag --limit=100
  python eval.py --workdir=runs/default --tasks=mine --tasks_dir=folder/of/yaml

Results are written after each task, as tasks-STEP-NAMES-DIGEST.json, with the settings that they depend on. A task
that fails does not stop the others; the exit code is then 1, or 2 where none has a result.
"""

from rat_jax import interrupts

if __name__ == "__main__":
    interrupts.exit_while_importing()

import dataclasses
import importlib.metadata
import importlib.util
import json
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import tqdm
from absl import flags

from rat_jax import program
from rat_jax.checkpoints import LoadedModel, Workdir, load_model
from rat_jax.config import MeshConfig
from rat_jax.data.corpus import Corpus
from rat_jax.data.pipeline import Batch
from rat_jax.errors import RatJaxError, RunStopped
from rat_jax.evaluation import results
from rat_jax.evaluation.length_evaluation import evaluate_length_generalization
from rat_jax.evaluation.perplexity import Evaluation, EvaluationError, check_fits, evaluate
from rat_jax.evaluation.report import plot, table
from rat_jax.files import FileError, write_json
from rat_jax.paths import local_path
from rat_jax.sampling.prompts import find_tokenizer
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
_LENGTH_GENERALIZATION = flags.DEFINE_integer(
    "length_generalization", None, "loss by position up to so many times data.seq_len of the training"
)
_TASKS = flags.DEFINE_list("tasks", None, "tasks, groups or tags of the lm-evaluation-harness, instead of the loss")
_TASKS_DIR = flags.DEFINE_string("tasks_dir", None, "folder of task files (YAML) beside the harness's own")
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "examples before each question of a task; left out: as each task says"
)
_LIMIT = flags.DEFINE_integer("limit", None, "documents of each task; left out: all")
_BOS = flags.DEFINE_enum(
    "bos", "empty", ["empty", "always"], "where the id that ends documents comes first: before nothing else, or always"
)
_TRUNCATION = flags.DEFINE_enum(
    "truncation", "left", ["left", "middle", "right"], "what is taken out of a task's context that is too long"
)
_JOINT_TOKENIZATION = flags.DEFINE_bool(
    "joint_tokenization", True, "tokenise a task's context and continuation as one text"
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "of generated texts, where a task does not say")
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


def _evaluate_losses(loaded: LoadedModel, workdir: Workdir, mesh: jax.sharding.Mesh, lengths: list[int]) -> None:
    corpus = _open_corpus(loaded, workdir)
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


def _evaluate_length_generalization(loaded: LoadedModel, workdir: Workdir, mesh: jax.sharding.Mesh) -> None:
    evaluate_length_generalization(
        loaded,
        _open_corpus(loaded, workdir),
        mesh,
        workdir.path,
        _LENGTH_GENERALIZATION.value,
        batch_tokens=_BATCH_TOKENS.value,
        max_batches=_MAX_BATCHES.value,
        print_json=_JSON.value,
        progress=_progress,
    )


def _check_task_flags(lengths: list[int]) -> None:
    """Refuses flags that have no effect with, or without, --tasks."""
    of_tasks = [_TASKS_DIR, _NUM_FEWSHOT, _LIMIT, _BOS, _TRUNCATION, _JOINT_TOKENIZATION, _MAX_NEW_TOKENS]
    for flag in [_MAX_BATCHES] if _TASKS.value else of_tasks:
        if flags.FLAGS[flag.name].present:
            raise EvaluationError(f"--{flag.name} has no effect {'with' if _TASKS.value else 'without'} --tasks")
    if _LENGTH_GENERALIZATION.present:
        for flag in (_TASKS, _CONTEXT_LENGTHS):
            if flag.present:
                raise EvaluationError(f"--{flag.name} has no effect with --length_generalization")
    if _TASKS.value and len(lengths) > 1:
        raise EvaluationError(f"--tasks wants one context length, got {', '.join(map(str, lengths))}")


def _evaluate_tasks(loaded: LoadedModel, workdir: Workdir, mesh: jax.sharding.Mesh, context_length: int) -> None:
    """Runs the tasks one by one; each is printed and written when it is done.

    Raises:
      EvaluationError: if no task has a result.
      RunStopped: if some have none, or a file could not be written.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError("--tasks needs the lm-evaluation-harness: pip install -r requirements-eval.txt")
    from rat_jax.evaluation import harness

    tokenizer = find_tokenizer(workdir, loaded.config, _DATA_PATH.value)
    folder = None if _TASKS_DIR.value is None else local_path(_TASKS_DIR.value, "--tasks_dir")
    settings = harness.TextSettings(
        context_length=context_length,
        bos=_BOS.value,
        truncation=_TRUNCATION.value,
        joint_tokenization=_JOINT_TOKENIZATION.value,
        max_new_tokens=_MAX_NEW_TOKENS.value,
    )
    model = harness.HarnessModel(
        loaded.model, tokenizer, mesh, settings, batch_tokens=_BATCH_TOKENS.value, progress=_progress
    )
    tasks = harness.Tasks(_TASKS.value, folder)
    measured = {
        "tokenizer_hash": tokenizer.hash,
        "lm_eval": importlib.metadata.version("lm_eval"),
        "tasks_dir": None if folder is None else str(folder),
        "num_fewshot": _NUM_FEWSHOT.value,
        "limit": _LIMIT.value,
    } | dataclasses.asdict(settings)
    path = results.tasks_path(workdir.path, loaded.step, tasks.names, measured)

    done: dict[str, dict[str, Any]] = {}

    def give_out(name: str, values: dict[str, Any]) -> None:
        done[name] = values
        if not _JSON.value:
            print(harness.table({name: values}, header=len(done) == 1), flush=True)
        if any("error" not in values for values in done.values()):
            write_json(path, results.tasks_as_json(loaded, measured, done))

    stopped = None
    try:
        harness.run_tasks(tasks, model, num_fewshot=_NUM_FEWSHOT.value, limit=_LIMIT.value, on_result=give_out)
    except (FileError, KeyboardInterrupt) as error:
        if not done:
            raise
        stopped = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
    if _JSON.value:
        print(json.dumps(results.tasks_as_json(loaded, measured, done)), flush=True)
    if stopped is not None:
        raise RunStopped(f"only {', '.join(done)} of the tasks {'is' if len(done) == 1 else 'are'} done: {stopped}")
    failed = [values["error"] for values in done.values() if "error" in values]
    if len(failed) == len(done):
        raise EvaluationError("; ".join(failed))
    print(f"written to {path}", file=sys.stderr)
    if failed:
        raise RunStopped(f"{len(failed)} of {len(done)} tasks failed: {'; '.join(failed)}")


def main() -> None:
    lengths = _context_lengths()
    _check_task_flags(lengths)
    workdir = Workdir(local_path(_WORKDIR.value, "--workdir"))
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1))
    loaded = load_model(workdir.path, _STEP.value, mesh=mesh, report=lambda line: print(line, file=sys.stderr))
    lengths = lengths or [loaded.config.data.seq_len]
    if _LENGTH_GENERALIZATION.present:
        _evaluate_length_generalization(loaded, workdir, mesh)
    elif _TASKS.value:
        _evaluate_tasks(loaded, workdir, mesh, lengths[0])
    else:
        _evaluate_losses(loaded, workdir, mesh, lengths)


if __name__ == "__main__":
    program.run(main, required=["workdir"], interrupts="raise")
