"""A checkpoint on tasks of the lm-evaluation-harness, each printed and written when it is done."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from rat_jax.errors import RunStopped
from rat_jax.evaluation import results
from rat_jax.evaluation.perplexity import EvaluationError
from rat_jax.evaluation.scoring import Progress
from rat_jax.evaluation.subject import Subject
from rat_jax.files import FileError, write_json


def evaluate_tasks(
    subject: Subject,
    names: Sequence[str],
    *,
    folder: pathlib.Path | None,
    num_fewshot: int | None,
    limit: int | None,
    text: dict[str, Any],
    batch_tokens: int,
    print_json: bool,
    progress: Progress,
) -> None:
    """Runs tasks one by one.

    Args:
      subject: what is evaluated.
      names: of tasks, groups or tags.
      folder: of task files.
      num_fewshot: examples before each question; None: what each task says.
      limit: documents of each task; None: all.
      text: the fields of `harness.TextSettings`.
      batch_tokens: tokens computed at a time, over all devices.
      print_json: instead of a table.
      progress: as of `Scorer.score`.

    Raises:
      EvaluationError: if no task has a result.
      RunStopped: if some have none, or a file could not be written.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError("--tasks needs the lm-evaluation-harness: pip install -r requirements-eval.txt")
    from rat_jax.evaluation import harness

    loaded = subject.loaded
    tokenizer = subject.tokenizer()
    settings = harness.TextSettings(**text)
    model = harness.HarnessModel(
        loaded.model, tokenizer, subject.mesh, settings, batch_tokens=batch_tokens, progress=progress
    )
    tasks = harness.Tasks(names, folder)
    measured = {
        "tokenizer_hash": tokenizer.hash,
        "lm_eval": importlib.metadata.version("lm_eval"),
        "tasks_dir": None if folder is None else str(folder),
        "num_fewshot": num_fewshot,
        "limit": limit,
    } | dataclasses.asdict(settings)
    path = results.tasks_path(subject.workdir.path, loaded.step, tasks.names, measured)

    done: dict[str, dict[str, Any]] = {}

    def give_out(name: str, values: dict[str, Any]) -> None:
        done[name] = values
        if not print_json:
            print(harness.table({name: values}, header=len(done) == 1), flush=True)
        if any("error" not in values for values in done.values()):
            write_json(path, results.tasks_as_json(loaded, measured, done))

    stopped = None
    try:
        harness.run_tasks(tasks, model, num_fewshot=num_fewshot, limit=limit, on_result=give_out)
    except (FileError, KeyboardInterrupt) as error:
        if not done:
            raise
        stopped = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
    if print_json:
        print(json.dumps(results.tasks_as_json(loaded, measured, done)), flush=True)
    if stopped is not None:
        raise RunStopped(f"only {', '.join(done)} of the tasks {'is' if len(done) == 1 else 'are'} done: {stopped}")
    failed = [values["error"] for values in done.values() if "error" in values]
    if len(failed) == len(done):
        raise EvaluationError("; ".join(failed))
    print(f"written to {path}", file=sys.stderr)
    if failed:
        raise RunStopped(f"{len(failed)} of {len(done)} tasks failed: {'; '.join(failed)}")
