"""Tasks of the lm-evaluation-harness on a model of ours; needs requirements-eval.txt, not PyTorch.

What a result depends on beside model and task is in `TextSettings`: where an end-of-document id stands in for a BOS,
which part of a context too long is read, and whether context and continuation are tokenised together.
"""

import dataclasses
import difflib
import json
import math
import pathlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jinja2
from datasets.exceptions import DatasetsError
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from rat_jax.data.tokenizer import Tokenizer
from rat_jax.errors import RatJaxError
from rat_jax.evaluation.perplexity import EvaluationError
from rat_jax.evaluation.scoring import Progress, Scorer
from rat_jax.model import LanguageModel
from rat_jax.sampling import generate_text

Bos = Literal["empty", "always"]
Truncation = Literal["left", "middle", "right"]

_FILE_FORMATS = ("json", "csv", "parquet", "text", "arrow")  # dataset_path of tasks whose data are local files
_SAMPLING_KEYS = ("top_k", "top_p", "repetition_penalty")  # of a task's generation_kwargs, as `generate` has them


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """How texts of tasks become what a model reads; the defaults are the harness's."""

    context_length: int  # tokens that are read at a time, those that are generated included
    # Where the id that ends documents stands in for a BOS: before texts that nothing precedes, or before every context.
    bos: Bos = "empty"
    truncation: Truncation = "left"  # what is taken out of a context that is too long
    # Whether a context and its continuation are tokenised as one text and cut where the context's own ids end.
    joint_tokenization: bool = True
    max_new_tokens: int = 256  # of generated texts, where a task does not say

    def __post_init__(self):
        for name, choices in (("bos", get_args(Bos)), ("truncation", get_args(Truncation))):
            if (value := getattr(self, name)) not in choices:
                raise EvaluationError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if self.max_new_tokens < 1:
            raise EvaluationError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")


class HarnessModel(TemplateLM):
    """A model of ours as the harness calls it."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh | None,
        settings: TextSettings,
        *,
        batch_tokens: int,
        progress: Progress | None = None,
    ):
        """The arguments are those of `Scorer`, the model's tokenizer, and how texts are read.

        Raises:
          EvaluationError: if a number is below 1.
        """
        super().__init__()
        self.settings = settings
        self.num_truncated = 0  # requests whose context was too long, so far
        self._model = model
        self._tokens = tokenizer  # the harness's own name, `tokenizer`, is for chat templates
        self._batch_tokens = batch_tokens
        self._scorer = Scorer(model, mesh, context_length=settings.context_length, batch_tokens=batch_tokens)
        self._progress = {} if progress is None else {"progress": progress}

    @property
    def eot_token_id(self) -> int:
        """The id that ends documents, which stands in for a BOS."""
        return self._tokens.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text, with nothing added."""
        return self._tokens.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """log p(continuation | context) of each request, and whether greedy decoding would give it."""
        for request in requests:
            if not request.args[1]:
                raise EvaluationError(
                    f"task {request.task_name}, document {request.doc_id}: the continuation is empty: nothing to score"
                )
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """log p of each text, 0 of an empty one."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        scores = iter(self._scorer.score_rolling([ids for ids in texts if ids], self.eot_token_id, **self._progress))
        return [next(scores).total if ids else 0.0 for ids in texts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The text after each context, up to one of its request's stop strings."""
        alike: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(index)
        texts = [""] * len(requests)
        for arguments, indices in alike.items():
            settings = self._generation_settings(json.loads(arguments))
            room = self.settings.context_length - settings["max_new_tokens"]
            if room < 1:
                raise EvaluationError(
                    f"task {requests[indices[0]].task_name} generates up to {settings['max_new_tokens']} tokens, which "
                    f"leave no room for a prompt in a context length of {self.settings.context_length}: choose a "
                    f"longer context, or a smaller max_gen_toks in the task"
                )
            prompts = [self._fitted(self.tok_encode(requests[index].args[0]), room) for index in indices]
            longest = max(map(len, prompts)) + settings["max_new_tokens"]
            new = generate_text(
                self._model, self._tokens, prompts, batch_size=max(1, self._batch_tokens // longest), **settings
            )
            for index, text in zip(indices, new, strict=True):
                texts[index] = text
        return texts

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self.settings.joint_tokenization:
            return super()._encode_pair(context, continuation)
        return self.tok_encode(context), self.tok_encode(continuation)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for (_, text), context, continuation in requests:
            if not continuation:
                raise EvaluationError(f"the continuation {text[:60]!r} has no tokens after its context")
            # What reads the last token of the continuation is one place less than its tokens.
            room = max(1, self.settings.context_length + 1 - len(continuation))
            pairs.append((self._fitted(context, room), continuation))
        return [(score.total, score.is_greedy) for score in self._scorer.score(pairs, **self._progress)]

    def _fitted(self, context: list[int], room: int) -> list[int]:
        """A context of `room` tokens at most, a BOS included, which is not taken out."""
        bos = [self.eot_token_id] if self.settings.bos == "always" or not context else []
        if context[:1] == [self.eot_token_id]:  # the harness has put it there
            bos, context = context[:1], context[1:]
        bos, room = bos[:room], room - len(bos)
        if len(context) <= room:
            return bos + context
        self.num_truncated += 1
        if room <= 0:
            return bos or context[-1:]
        match self.settings.truncation:
            case "left":
                context = context[-room:]
            case "right":
                context = context[:room]
            case "middle":
                context = context[: room // 2] + context[len(context) - (room - room // 2) :]
        return bos + context

    def _generation_settings(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What a task's generation_kwargs mean to `generate_text`."""
        given = normalize_gen_kwargs(arguments, self.settings.max_new_tokens)
        stop = [string for string in given.pop("until") if string]  # an empty one means none
        settings = {"stop": stop, "max_new_tokens": given.pop("max_gen_toks")}
        sampled = given.pop("do_sample")
        settings["temperature"] = given.pop("temperature", 1.0) if sampled else 0.0
        given.pop("temperature", None)
        for name in _SAMPLING_KEYS:
            value = given.pop(name, None)
            if value is not None and (settings["temperature"] > 0 or name == "repetition_penalty"):
                settings[name] = value
        if given.pop("num_beams", 1) != 1 or given:
            names = ", ".join(given) or "num_beams"
            raise EvaluationError(f"a task's generation_kwargs have {names}, which is not supported: take it out")
        return settings


class Tasks:
    """The tasks of the harness and those of a folder of task files."""

    def __init__(self, names: Sequence[str], folder: pathlib.Path | None = None):
        """Looks up names: of tasks, groups or tags.

        Args:
          names: at least one.
          folder: of task files (YAML), which may have the names of others and come first. The harness's own are not
            read where all names are tasks of this folder, since that takes long.

        Raises:
          EvaluationError: a name that is not known, a name given twice, or no folder.
        """
        if folder is not None and not folder.is_dir():
            raise EvaluationError(f"there is no folder {folder} of task files")
        if not names or len(set(names)) < len(names):
            raise EvaluationError(f"name one or several different tasks, got {', '.join(names) or 'none'}")
        self.names = list(names)
        self._manager = None if folder is None else TaskManager(include_path=str(folder), include_defaults=False)
        if self._manager is None or not set(names) <= set(self._manager.all_subtasks):
            self._manager = TaskManager(include_path=None if folder is None else str(folder))
        for name in names:
            if name not in self._manager.task_index:
                close = difflib.get_close_matches(name, self._manager.all_tasks, n=3)
                hint = f"; did you mean {' or '.join(close)}?" if close else ""
                raise EvaluationError(f"there is no task {name!r} in the harness or in --tasks_dir{hint}")

    def load(self, name: str) -> list[Task | Group]:
        """A task, a group, or the tasks of a tag, with their data.

        Raises:
          EvaluationError: if the data cannot be loaded, a task does not fit them, or needs a package that is not there.
        """
        try:
            loaded = self._manager.load([name])
        except jinja2.TemplateError as error:
            raise self._misfit(name, error) from None
        except ImportError as error:
            reason = " ".join(str(error).split())[:300]
            raise EvaluationError(f"task {name} needs a package that is not installed: {reason}") from None
        except (OSError, ValueError, LookupError, DatasetsError) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise EvaluationError(
                f"task {name}: {self._data_of(name)} cannot be loaded: {reason}; {self._remedy(name)}"
            ) from None
        if name in loaded["groups"]:
            return [loaded["groups"][name]]
        return list(loaded["tasks"].values())

    def run(self, name: str, model: HarnessModel, *, num_fewshot: int | None, limit: int | None) -> dict[str, Any]:
        """The harness's results of one name, as values that JSON can hold, and how many contexts were too long.

        Args:
          name: one of `names`.
          model: what is evaluated.
          num_fewshot: examples before each question; None: what the task says.
          limit: documents of each task; None: all.

        Raises:
          EvaluationError: if data cannot be loaded, or the task does not fit them.
          RatJaxError: as the model's functions do.
        """
        items = self.load(name)
        num_truncated = model.num_truncated
        try:
            found = simple_evaluate(
                model=model,
                tasks=items,
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=self._manager,
                log_samples=False,
            )
        except (LookupError, jinja2.TemplateError) as error:
            raise self._misfit(name, error) from None
        kept = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "n-samples", "higher_is_better")
        values = {key: found[key] for key in kept if key in found}
        return _finite(json.loads(json.dumps(values, default=handle_non_serializable))) | {
            "num_truncated": model.num_truncated - num_truncated
        }

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
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return EvaluationError(
            f"task {name} does not fit {self._data_of(name)}: {reason}; compare its file with the data's columns"
        )

    def _data_of(self, name: str) -> str:
        entry = self._manager.task_index[name]
        config = entry.cfg or {}
        if "dataset_path" not in config:
            return "the data"
        parts = [str(config["dataset_path"]), str(config.get("dataset_name") or "")]
        files = (config.get("dataset_kwargs") or {}).get("data_files")
        return f"the data set {' '.join(filter(None, parts))}" + (f" ({files})" if files else "")


def run_tasks(
    tasks: Tasks,
    model: HarnessModel,
    *,
    num_fewshot: int | None,
    limit: int | None,
    on_result: Callable[[str, dict[str, Any]], None],
) -> None:
    """Runs all tasks; one that fails does not stop the others.

    Args:
      tasks: to run.
      model: what is evaluated.
      num_fewshot: examples before each question; None: what each task says.
      limit: documents of each task; None: all.
      on_result: called with a task's name and its results when they are there, `{"error": message}` if it failed.

    Raises:
      EvaluationError: if a number is out of range.
    """
    if num_fewshot is not None and num_fewshot < 0:
        raise EvaluationError(f"num_fewshot must be 0 or more, got {num_fewshot}")
    if limit is not None and limit < 1:
        raise EvaluationError(f"limit must be 1 or more, got {limit}")
    for name in tasks.names:
        try:
            values = tasks.run(name, model, num_fewshot=num_fewshot, limit=limit)
        except RatJaxError as error:
            values = {"error": str(error)}
        on_result(name, values)


def table(results: dict[str, dict[str, Any]], *, header: bool) -> str:
    """Text: a line for each metric of each task, with its standard error."""
    lines = [f"{'task':<32} {'metric':<20} {'documents':>9} {'value':>9} {'stderr':>9}"] if header else []
    for name, values in results.items():
        if "error" in values:
            lines.append(f"{name:<32} failed: {values['error']}")
            continue
        for task, metrics in values["results"].items():
            count = values["n-samples"].get(task, {}).get("effective", "")
            for metric, value in metrics.items():
                label, _, of = metric.partition(",")
                if not of or label.endswith("_stderr"):
                    continue
                label = label if of == "none" else f"{label} ({of})"
                error = metrics.get(f"{metric.partition(',')[0]}_stderr,{of}")
                cells = [f"{x:.4f}" if isinstance(x, float) else str(x or "") for x in (value, error)]
                lines.append(f"{task:<32} {label:<20} {count:>9} {cells[0]:>9} {cells[1]:>9}")
        if values["num_truncated"]:
            lines.append(f"{name:<32} {values['num_truncated']} contexts were too long and cut")
    return "\n".join(lines)


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
