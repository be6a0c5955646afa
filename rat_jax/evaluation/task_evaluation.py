"""A checkpoint on tasks of the lm-evaluation-harness, each printed and written when it is done."""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from rat_jax.errors import RatJaxError, RunStopped
from rat_jax.evaluation import results
from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.groups import TaskGroup
from rat_jax.evaluation.progress import Progress
from rat_jax.evaluation.subject import Subject, check_same_on_all_hosts
from rat_jax.evaluation.task_report import table
from rat_jax.evaluation.text_settings import TextSettings
from rat_jax.files import write_json


def evaluate_tasks(
    subject: Subject,
    names: Sequence[str],
    *,
    folder: pathlib.Path | None,
    num_fewshot: int | None,
    limit: int | None,
    text: Mapping[str, Any],
    batch_tokens: int,
    print_json: bool,
    progress: Progress,
) -> None:
    """Runs tasks one by one.

    Args:
      subject: what is evaluated.
      names: of groups of `rat_jax.evaluation.groups`, and of tasks, groups or tags of the harness.
      folder: of task files.
      num_fewshot: examples before each question; None: what each task's group says, or its file.
      limit: documents of each task; None: all.
      text: the fields of `TextSettings` that the command gives; for others a task's group says, then the defaults.
      batch_tokens: tokens computed at a time, over all devices.
      print_json: instead of a table.
      progress: as of `Scorer.score`.

    Raises:
      EvaluationError: if no task has a result.
      RunStopped: if some have none, or a file could not be written.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError("--tasks needs the lm-evaluation-harness: pip install -r requirements-eval.txt")
    from rat_jax.evaluation.harness import HarnessModel
    from rat_jax.evaluation.harness_tasks import Tasks, run_tasks

    loaded = subject.loaded
    tokenizer = subject.tokenizer()
    tasks = Tasks(names, folder)

    def settings_of(group: TaskGroup | None) -> TextSettings:
        of_group = {} if group is None else group.text
        return TextSettings(**{"context_length": loaded.config.data.seq_len, **of_group, **text})

    @functools.cache
    def model_with(settings: TextSettings) -> HarnessModel:
        return HarnessModel(
            loaded.model, tokenizer, subject.mesh, settings, batch_tokens=batch_tokens, progress=progress
        )

    measured = {
        "tokenizer_hash": tokenizer.hash,
        "lm_eval": importlib.metadata.version("lm_eval"),
        "tasks_dir": None if folder is None else str(folder),
        "num_fewshot": num_fewshot,
        "limit": limit,
    } | dataclasses.asdict(settings_of(None))
    if tasks.groups:
        measured["groups"] = {
            name: {
                "metrics": {task.name: task.metric for task in group.tasks},
                "source": group.source,
                "num_fewshot": group.num_fewshot,
            }
            | dataclasses.asdict(settings_of(group))
            for name, group in tasks.groups.items()
        }
    named_by = measured  # where the files of tasks are does not matter, but what they say
    if (files_hash := tasks.files_hash()) is not None:
        measured["tasks_hash"] = files_hash
        named_by = measured | {"tasks_dir": None}
    check_same_on_all_hosts(named_by)
    path = results.tasks_path(subject.workdir.path, loaded.step, names, named_by)

    earlier: dict[str, dict[str, Any]] = results.earlier_entries(path, "tasks") or {}
    done: dict[str, dict[str, Any]] = {}

    def as_json(entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
        means = {name: group.mean(entries) for name, group in tasks.groups.items()}
        return results.tasks_as_json(loaded, measured, entries) | ({"group_means": means} if means else {})

    def give_out(name: str, values: dict[str, Any]) -> None:
        done[name] = values | {"settings": dataclasses.asdict(settings_of(tasks.group_of(name)))}
        if jax.process_index() != 0:
            return
        if not print_json:
            print(table({name: values}, header=len(done) == 1), flush=True)
        if any("error" not in values for values in done.values()):
            write_json(path, as_json(_newest(earlier, done)))

    def model_of(name: str) -> HarnessModel:
        return model_with(settings_of(tasks.group_of(name)))

    stopped = None
    try:
        run_tasks(tasks, model_of, num_fewshot=num_fewshot, limit=limit, on_result=give_out)
    except (RatJaxError, KeyboardInterrupt) as error:
        if not done:
            raise
        stopped = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
    if print_json:
        print(json.dumps(as_json(done)), flush=True)
    else:
        for name, group in tasks.groups.items():
            if (mean := group.mean(done)) is not None:
                print(f"{name:<32} mean of {len(group.tasks)} tasks {mean:.4f}", flush=True)
    if stopped is not None:
        raise RunStopped(f"only {', '.join(done)} of the tasks {'is' if len(done) == 1 else 'are'} done: {stopped}")
    failed = [values["error"] for values in done.values() if "error" in values]
    if len(failed) == len(done):
        raise EvaluationError("; ".join(failed))
    print(f"written to {path}", file=sys.stderr)
    if failed:
        raise RunStopped(f"{len(failed)} of {len(done)} tasks failed: {'; '.join(failed)}")


def _newest(earlier: dict[str, dict[str, Any]], done: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What a command has done so far, and what an earlier one had of tasks that it has no result of."""
    kept = {name: values for name, values in earlier.items() if "error" in done.get(name, {"error": None})}
    return done | {name: values for name, values in kept.items() if "error" not in values}
