"""Tasks of the lm-evaluation-harness by name: where their files are, how they are loaded and run."""

import difflib
import functools
import importlib.util
import json
import math
import pathlib
import random
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jinja2
import numpy as np
import yaml
from datasets import Dataset
from datasets.exceptions import DatasetsError
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict
from lm_eval.utils import handle_non_serializable

from rat_jax.checkpoints.hosts import on_all_hosts
from rat_jax.errors import RatJaxError
from rat_jax.evaluation import harness
from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.groups import GROUPS, GroupTask, TaskGroup
from rat_jax.evaluation.harness import HarnessModel
from rat_jax.evaluation.task_files import hash_of_files

_FILE_FORMATS = ("json", "csv", "parquet", "text", "arrow")  # dataset_path of tasks whose data are local files
_SEEDS = {"random": 0, "numpy": 1234, "fewshot": 1234}  # those of the harness's own programs
_OUR_FILES = pathlib.Path(__file__).parent / "tasks"
_HARNESS_FILES = pathlib.Path(importlib.util.find_spec("lm_eval.tasks").origin).parent
# What a task's file, its functions and the harness's may raise for it: they are code of others, and one must not lose
# the results of all.
_ERRORS_OF_TASKS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    StopIteration,
    SyntaxError,
    TypeError,
    ValueError,
    DatasetsError,
    jinja2.TemplateError,
    yaml.YAMLError,
)
_KNOWN = {task.name: (group, task) for name, group in GROUPS.items() for task in group.tasks}


class Tasks:
    """The tasks of `GROUPS`, of the harness, and of a folder of task files."""

    def __init__(self, names: Sequence[str], folder: pathlib.Path | None = None):
        """Looks up names.

        Args:
          names: at least one: of `GROUPS`; or of tasks, groups or tags of the harness or the folder. A task of the
            harness that is named by itself is as the harness has it, without what a group of ours changes.
          folder: of task files (YAML), which may have the names of others and come first. All of the harness's files
            are read only where a name is neither known here nor in the folder, since that takes long.

        Raises:
          EvaluationError: a name that is not known, a name given twice, or no folder.
        """
        if folder is not None and not folder.is_dir():
            raise EvaluationError(f"there is no folder {folder} of task files")
        self.groups: dict[str, TaskGroup] = {name: GROUPS[name] for name in names if name in GROUPS}
        self._specs: dict[str, tuple[TaskGroup, GroupTask]] = {}
        self.names: list[str] = []  # of what is run one by one
        for name in names:
            if name in self.groups:
                self._specs |= {task.name: (GROUPS[name], task) for task in GROUPS[name].tasks}
                self.names += [task.name for task in GROUPS[name].tasks]
            else:
                if name in _KNOWN and _KNOWN[name][1].folder is None:
                    self._specs[name] = _KNOWN[name]
                self.names.append(name)
        if not names or len(set(self.names)) < len(self.names):
            given = ", ".join(self.names) or "none"
            raise EvaluationError(f"name one or several different tasks, got {given}")
        self._folder = folder
        self._manager = _manager(self.names, folder)
        for name in self.names:
            if name not in self._manager.task_index:
                close = difflib.get_close_matches(name, [*GROUPS, *self._manager.all_tasks], n=3)
                hint = f"; did you mean {' or '.join(close)}?" if close else ""
                raise EvaluationError(f"there is no task {name!r} in the harness or in the folder of task files{hint}")

    def group_of(self, name: str) -> TaskGroup | None:
        """The group whose settings a task has."""
        return self._specs[name][0] if name in self._specs else None

    def files_hash(self) -> str | None:
        """SHA-256 of the folder's task files and of the local data that the tasks to run name; None without a folder.

        Raises:
          FileError: if the system refuses to read one.
        """
        if self._folder is None:
            return None
        configs = [self._manager.task_index[name].cfg or {} for name in self.names]
        local = [config for config in configs if config.get("dataset_path") in _FILE_FORMATS]
        return hash_of_files(self._folder, [(config.get("dataset_kwargs") or {}).get("data_files") for config in local])

    def load(self, name: str) -> TaskDict:
        """A task, a group, or the tasks of a tag, with their data.

        Raises:
          EvaluationError: if the data cannot be loaded, a task does not fit them, or needs a package that is not there.
        """
        spec = self._specs[name][1] if name in self._specs else None
        changes = {} if spec is None else self._changes(spec)
        try:
            if changes:
                in_group = self._manager.load([{"group": "changed", "task": [{"task": name, **changes}]}])
                loaded = self._manager.load([in_group["tasks"][name]])
            else:
                loaded = self._manager.load([name])
        except ImportError as error:
            raise EvaluationError(f"task {name} needs a package that is not installed: {_reason(error)}") from None
        except _ERRORS_OF_TASKS as error:
            if not _comes_from(error, ConfigurableTask.download.__code__.co_filename, "download"):
                raise self._misfit(name, error) from None
            raise EvaluationError(
                f"task {name}: {self._data_of(name)} cannot be loaded: {_reason(error)}; {self._remedy(name)}"
            ) from None
        if spec is not None and spec.answer_ends is not None:
            config = loaded["tasks"][name].config
            config.process_results = _ending_at(spec.answer_ends, config.process_results)
        return loaded

    def run(
        self,
        name: str,
        model: HarnessModel,
        *,
        num_fewshot: int | None,
        limit: int | None,
        loaded: TaskDict | None = None,
    ) -> dict[str, Any]:
        """The harness's results of one name, as values that JSON can hold.

        Beside them are how many contexts were too long, how many documents the protocol leaves out, and, where there
        are any, the tasks that show no examples whatever `num_fewshot` is.

        Args:
          name: one of `names`.
          model: what is evaluated.
          num_fewshot: examples before each question; None: what the task says. One whose file says 0 shows none.
          limit: documents of each task; None: all.
          loaded: what `load` gave for the name; None: it is loaded here.

        Raises:
          EvaluationError: if data cannot be loaded, or the task does not fit them.
          RatJaxError: as the model's functions do.
        """
        loaded = self.load(name) if loaded is None else loaded
        num_truncated, num_left_out = model.num_truncated, 0
        without_examples = [
            task for task in loaded["tasks"] if not _choose_examples(loaded["tasks"][task], num_fewshot)
        ]
        try:
            if name in self._specs and self._specs[name][1].cut is not None:
                num_left_out = _cut(loaded["tasks"][name], self._specs[name][1], model)
            random.seed(_SEEDS["random"])
            np.random.seed(_SEEDS["numpy"])  # noqa: NPY002  # what tasks draw from
            found = evaluate(model, loaded, limit=limit, log_samples=False)
        except RatJaxError as error:
            raise EvaluationError(f"task {name}: {str(error).removeprefix(f'task {name}: ')}") from None
        except _ERRORS_OF_TASKS as error:
            if _comes_from(error, harness.__file__):  # a fault of this package
                raise
            raise self._misfit(name, error) from None
        for task, figures in found["results"].items():
            if task in loaded["tasks"] and not any("," in figure for figure in figures):
                raise EvaluationError(
                    f"task {name}: nothing of {task} was measured: its file has no metric that the harness knows"
                )
        kept = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "n-samples", "higher_is_better")
        values = {key: found[key] for key in kept if key in found}
        return _finite(json.loads(json.dumps(values, default=handle_non_serializable))) | {
            "num_truncated": model.num_truncated - num_truncated,
            "num_left_out": num_left_out,
            **({"without_examples": without_examples} if without_examples else {}),
        }

    def _changes(self, spec: GroupTask) -> dict[str, Any]:
        """What a group changes of a task's file.

        Raises:
          EvaluationError: if the file has not what is to be changed.
        """
        config = self._manager.task_index[spec.name].cfg or {}
        changes: dict[str, Any] = {}
        if spec.prompt_change is not None:
            old, new = spec.prompt_change
            prompt = str(config.get("doc_to_text"))
            if prompt.count(old) != 1:
                raise EvaluationError(
                    f"task {spec.name}: the prompt {prompt[-60:]!r} of its file has not {old!r} once, which the "
                    f"group's protocol changes to {new!r}: name the task by itself to ask it as it is"
                )
            changes["doc_to_text"] = prompt.replace(old, new)
        if spec.stop is not None:
            changes["generation_kwargs"] = {**config.get("generation_kwargs", {}), "until": list(spec.stop)}
        return changes

    def _remedy(self, name: str) -> str:
        """How to place the data of a task that could not be loaded."""
        path = (self._manager.task_index[name].cfg or {}).get("dataset_path", "")
        if path in _FILE_FORMATS:
            return "put the files there, or mend dataset_kwargs in the task's file"
        return (
            f"it is downloaded from huggingface.co/datasets/{path}: run this once where there is a network and copy "
            f"the folder of HF_HOME here, or write a task file with dataset_path: json and your own files (--tasks_dir)"
        )

    def _misfit(self, name: str, error: Exception) -> EvaluationError:
        return EvaluationError(
            f"task {name} does not fit {self._data_of(name)}: {type(error).__name__}: {_reason(error)}; compare its "
            f"file with the data's columns"
        )

    def _data_of(self, name: str) -> str:
        entry = self._manager.task_index[name]
        config = entry.cfg or {}
        if "dataset_path" not in config:
            return "the data"
        parts = [str(config["dataset_path"]), str(config.get("dataset_name") or "")]
        files = (config.get("dataset_kwargs") or {}).get("data_files")
        return f"the data set {' '.join(filter(None, parts))}" + (f" ({files})" if files else "")


def _manager(names: Sequence[str], folder: pathlib.Path | None) -> TaskManager:
    """An index of task files; where several have a name, those of the folder come first, then ours."""
    own = [str(_OUR_FILES), *([] if folder is None else [str(folder)])]
    known = dict.fromkeys(_KNOWN[name][1].folder for name in names if name in _KNOWN and _KNOWN[name][1].folder)
    manager = TaskManager(include_path=[*(str(_HARNESS_FILES / path) for path in known), *own], include_defaults=False)
    if set(names) <= set(manager.all_subtasks):
        return manager
    return TaskManager(include_path=own)


def _comes_from(error: BaseException, file: str, function: str | None = None) -> bool:
    """Whether it was raised within a file's functions, or within one of them."""
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(code.co_filename == file and function in (None, code.co_name) for code in codes)


def _reason(error: BaseException) -> str:
    """What an error and the one that it came from say, in one line."""
    if isinstance(error, StopIteration):
        return "a file is empty"
    said = dict.fromkeys(" ".join(str(one).split()) for one in (error, error.__cause__) if one is not None)
    return ": ".join(filter(None, said))[:300] or type(error).__name__


def _ending_at(ends: Sequence[str], judge: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
    """`process_results` of a task for answers that are cut where the model goes on with something else."""

    def judge_cut(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
        (answer,) = results
        answer = answer.lstrip("\n")
        for end in ends:
            answer = answer.partition(end)[0]
        return judge(doc, [answer])

    return judge_cut


def _choose_examples(task: ConfigurableTask, num_fewshot: int | None) -> bool:
    """Sets how many examples a task shows, and which; returns whether they are as many as asked for.

    A task whose file says 0 shows none, as in the harness.
    """
    of_file = task.get_config("num_fewshot")
    if of_file is None or (of_file != 0 and num_fewshot is not None):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=_SEEDS["fewshot"])
    return not (of_file == 0 and num_fewshot)


def _cut(task: ConfigurableTask, spec: GroupTask, model: HarnessModel) -> int:
    """Cuts a task's documents for a model; returns how many are left out."""
    split = task.config.test_split or task.config.validation_split
    rows = list(task.dataset[split])
    try:
        cut = [spec.cut.apply(row, model.tokens, model.settings.context_length) for row in rows]
    except EvaluationError as error:
        raise EvaluationError(f"task {spec.name}: {error}") from None
    kept = [row for row in cut if row is not None]
    if not kept:
        raise EvaluationError(f"task {spec.name}: no document has an answer of more than one character")
    task.dataset[split] = Dataset.from_list(kept)
    return len(rows) - len(kept)


def run_tasks(
    tasks: Tasks,
    model_of: Callable[[str], HarnessModel],
    *,
    num_fewshot: int | None,
    limit: int | None,
    on_result: Callable[[str, dict[str, Any]], None],
) -> None:
    """Runs all tasks; one that fails does not stop the others.

    On several hosts this holds of tasks that cannot be loaded. One that fails later, which it may do on this host
    alone while others wait for it, stops all.

    Args:
      tasks: to run.
      model_of: what is evaluated, by a task's name, as its settings want it to read.
      num_fewshot: examples before each question; None: what each task's group says, or its file.
      limit: documents of each task; None: all.
      on_result: called with a task's name and its results when they are there, `{"error": message}` if it failed.

    Raises:
      EvaluationError: if a number is out of range.
      RatJaxError: on several hosts, of a task that fails once it is loaded.
    """
    if num_fewshot is not None and num_fewshot < 0:
        raise EvaluationError(f"num_fewshot must be 0 or more, got {num_fewshot}")
    if limit is not None and limit < 1:
        raise EvaluationError(f"limit must be 1 or more, got {limit}")
    for name in tasks.names:
        group = tasks.group_of(name)
        examples = group.num_fewshot if num_fewshot is None and group is not None else num_fewshot
        loaded = None
        try:
            loaded = on_all_hosts(functools.partial(tasks.load, name))
            values = tasks.run(name, model_of(name), num_fewshot=examples, limit=limit, loaded=loaded)
        except RatJaxError as error:
            if loaded is not None and jax.process_count() > 1:
                raise
            values = {"error": str(error)}
        on_result(name, values)


def _finite(values: Any) -> Any:
    """Values of JSON with None for numbers that JSON lacks."""
    match values:
        case dict():
            return {key: _finite(value) for key, value in values.items()}
        case list():
            return [_finite(value) for value in values]
        case float() if not math.isfinite(values):
            return None
    return values
