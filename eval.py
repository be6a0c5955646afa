"""Evaluates a trained model on the validation split: loss, perplexity, bits a byte, and the loss by position.

  python eval.py --workdir=runs/default
  python eval.py --workdir=runs/default --context_lengths=256,512,1024

Prints a table, then writes it into the workdir, as evaluation-STEP-CORPUS-LENGTHS-DIGEST.json and .png: results of
other data, lengths or parts of the split have files of their own. Exit codes: 0; 2 if flags, the workdir, its
checkpoint or the data do not fit; 1 if a later length failed, a signal came after the first, or a file could not be
written, after what was computed is printed; 75 if a signal came before; 76 if another process of the job is lost.

All devices are used, of several hosts with the flags of train.py for them; --mesh says how (docs/scaling.md):

  python eval.py --workdir=runs/default --mesh=fsdp=-1

Or at positions up to so many times the training length, in chunks, with the mixers' caches:

  python eval.py --workdir=runs/default --length_generalization=8

Or on tasks of the lm-evaluation-harness (pip install -r requirements-eval.txt), on groups of tasks by the protocols of
papers (docs/evaluation.md), and on task files of your own:

  python eval.py --workdir=runs/default --tasks=arc_easy,hellaswag --limit=100
  python eval.py --workdir=runs/default --tasks=csr,longbench,recall
  python eval.py --workdir=runs/default --tasks=mine --tasks_dir=folder/of/yaml

Or on RULER's tasks (docs/evaluation.md), which need no data and take several context lengths:

  python eval.py --workdir=runs/default --tasks=ruler --ruler_essay=texts --context_lengths=1024,2048 --limit=100

Or on prompts with reference answers (docs/finetuning.md), by ROUGE-L, token F1 and exact match of greedy answers:

  python eval.py --workdir=runs/tuned --sft=data/sft/qmsum/test.jsonl --max_new_tokens=384

They are written as answers-STEP-FILE-DIGEST.jsonl, where the same command goes on, and the scores as .json.

Results of tasks are written after each task, as tasks-STEP-NAMES-DIGEST.json, with the settings that they depend on;
RULER's as ruler-STEP-NAMES-DIGEST.json, and a picture of depth and length. A task that fails does not stop the others;
the exit code is then 1, or 2 where none has a result.
"""

from rat_jax import interrupts, stopwatch

if __name__ == "__main__":
    interrupts.exit_while_importing()

import functools
import sys
from collections.abc import Iterable
from typing import Any

import tqdm
from absl import flags

from rat_jax import cluster, program
from rat_jax.checkpoints import Workdir, load_model
from rat_jax.compilation_cache import define_cache_flag
from rat_jax.evaluation import EvaluationError, ruler
from rat_jax.evaluation.answers import AnswerSettings, evaluate_answers
from rat_jax.evaluation.length_evaluation import evaluate_length_generalization
from rat_jax.evaluation.loss_evaluation import evaluate_losses
from rat_jax.evaluation.mode import Mode, chosen_mode
from rat_jax.evaluation.subject import Subject
from rat_jax.evaluation.task_evaluation import evaluate_tasks
from rat_jax.evaluation_config import NEW_TOKENS
from rat_jax.mesh_flag import define_mesh_flag
from rat_jax.paths import local_path

_use_compilation_cache, _mesh, _join_cluster = define_cache_flag(), define_mesh_flag(), cluster.define_cluster_flags()
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
_TASKS = flags.DEFINE_list("tasks", None, "groups as csr, or tasks of the lm-evaluation-harness, instead of the loss")
_TASKS_DIR = flags.DEFINE_string("tasks_dir", None, "folder of task files (YAML) beside the harness's own")
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot",
    None,
    "examples before each question of a task whose file does not say 0; left out: as the task or its group says",
)
_LIMIT = flags.DEFINE_integer("limit", None, "documents of each task; left out: all")
_BOS = flags.DEFINE_enum(
    "bos",
    None,
    ["empty", "always"],
    "where the id that ends documents comes first: before nothing else, or always; left out: as the task's group says, "
    "or empty",
)
_TRUNCATION = flags.DEFINE_enum(
    "truncation",
    None,
    ["left", "middle", "right"],
    "what is taken out of a task's context that is too long; left out: as the task's group says, or left",
)
_JOINT_TOKENIZATION = flags.DEFINE_bool(
    "joint_tokenization", None, "tokenise a task's context and continuation as one text; left out: true"
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, f"of generated texts, where a task does not say; left out: {NEW_TOKENS}"
)
_SFT = flags.DEFINE_string("sft", None, "JSON lines of prompts and answers: greedy answers are compared with theirs")
_RULER_TEMPLATES = flags.DEFINE_enum(
    "ruler_templates",
    "harness",
    ["harness", "own"],
    "RULER's sentences, of the harness that is installed, or short ones",
)
_RULER_ESSAY = flags.DEFINE_string("ruler_essay", None, "text that RULER's needles are hidden in: a file or folder")
_RULER_SPLIT = flags.DEFINE_enum(
    "ruler_split", "validation", ["train", "validation"], "whose keys, values and sentences RULER's examples have"
)
_RULER_SEED = flags.DEFINE_integer("ruler_seed", 0, "of RULER's examples")
_RULER_ANSWER_TOKENS = flags.DEFINE_integer(
    "ruler_answer_tokens", None, "room for an answer of RULER in the context; left out: RULER's of each task"
)
_JSON = flags.DEFINE_bool("json", False, "print JSON instead of the table")


def _context_lengths() -> list[int]:
    """The lengths asked for; an empty list where the training's is meant."""
    try:
        return sorted({int(length) for length in _CONTEXT_LENGTHS.value or []})
    except ValueError as error:
        raise EvaluationError(f"--context_lengths wants numbers with commas between: {error}") from None


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _progress(batches: Iterable[Any], num_batches: int) -> Iterable[Any]:
    return tqdm.tqdm(batches, total=num_batches, unit="batch", disable=not sys.stderr.isatty(), leave=False)


def _losses(subject: Subject) -> None:
    evaluate_losses(
        subject,
        _context_lengths() or [subject.loaded.config.data.seq_len],
        batch_tokens=_BATCH_TOKENS.value,
        max_batches=_MAX_BATCHES.value,
        print_json=_JSON.value,
        progress=_progress,
    )


def _length_generalization(subject: Subject) -> None:
    evaluate_length_generalization(
        subject,
        _LENGTH_GENERALIZATION.value,
        batch_tokens=_BATCH_TOKENS.value,
        max_batches=_MAX_BATCHES.value,
        print_json=_JSON.value,
        progress=_progress,
    )


def _tasks(subject: Subject) -> None:
    text = {
        "context_length": next(iter(_context_lengths()), None),
        "bos": _BOS.value,
        "truncation": _TRUNCATION.value,
        "joint_tokenization": _JOINT_TOKENIZATION.value,
        "max_new_tokens": _MAX_NEW_TOKENS.value,
    }
    evaluate_tasks(
        subject,
        _TASKS.value,
        folder=None if _TASKS_DIR.value is None else local_path(_TASKS_DIR.value, "--tasks_dir"),
        num_fewshot=_NUM_FEWSHOT.value,
        limit=_LIMIT.value,
        text={name: value for name, value in text.items() if value is not None},
        batch_tokens=_BATCH_TOKENS.value,
        print_json=_JSON.value,
        progress=_progress,
    )


def _answers(subject: Subject) -> None:
    new_tokens = {} if _MAX_NEW_TOKENS.value is None else {"max_new_tokens": _MAX_NEW_TOKENS.value}
    evaluate_answers(
        subject,
        local_path(_SFT.value, "--sft"),
        AnswerSettings(next(iter(_context_lengths()), subject.loaded.config.data.seq_len), **new_tokens),
        batch_tokens=_BATCH_TOKENS.value,
        limit=_LIMIT.value,
        print_json=_JSON.value,
    )


def _ruler(subject: Subject) -> None:
    ruler.evaluate_checkpoint(
        subject,
        tasks=_TASKS.value,
        print_json=_JSON.value,
        context_lengths=_context_lengths() or [subject.loaded.config.data.seq_len],
        batch_tokens=_BATCH_TOKENS.value,
        templates=_RULER_TEMPLATES.value,
        essay=_RULER_ESSAY.value,
        split=_RULER_SPLIT.value,
        seed=_RULER_SEED.value,
        answer_tokens=_RULER_ANSWER_TOKENS.value,
        bos=_BOS.value == "always",
        **({} if _LIMIT.value is None else {"num_examples": _LIMIT.value}),
    )


# A mode is chosen by its flag and may have flags of its own, which the others refuse.
_OF_RULER = [
    _CONTEXT_LENGTHS,
    _LIMIT,
    _BOS,
    _RULER_TEMPLATES,
    _RULER_ESSAY,
    _RULER_SPLIT,
    _RULER_SEED,
    _RULER_ANSWER_TOKENS,
]
_OF_TASKS = [
    _CONTEXT_LENGTHS,
    _TASKS_DIR,
    _NUM_FEWSHOT,
    _LIMIT,
    _BOS,
    _TRUNCATION,
    _JOINT_TOKENIZATION,
    _MAX_NEW_TOKENS,
]
_MODES = [
    Mode(None, [_MAX_BATCHES, _CONTEXT_LENGTHS], _losses, several_lengths=True),
    Mode(_LENGTH_GENERALIZATION, [_MAX_BATCHES], _length_generalization),
    Mode(_TASKS, _OF_RULER, _ruler, several_lengths=True, values=ruler.are_ruler_tasks, example="ruler"),
    Mode(_TASKS, _OF_TASKS, _tasks),
    Mode(_SFT, [_CONTEXT_LENGTHS, _LIMIT, _MAX_NEW_TOKENS], _answers),
]


def main() -> None:
    times = stopwatch.Stopwatch()
    mode = chosen_mode(_MODES)
    if _BATCH_TOKENS.value < 1:
        raise EvaluationError(f"batch_tokens must be 1 or more, got {_BATCH_TOKENS.value}")
    lengths = _context_lengths()
    if len(lengths) > 1 and not mode.several_lengths:
        raise EvaluationError(f"--{mode.flag.name} wants one context length, got {', '.join(map(str, lengths))}")
    workdir = Workdir(local_path(_WORKDIR.value, "--workdir"))
    _join_cluster(cluster.given_flags() | {"--workdir": str(workdir.path)})
    with cluster.first_alone_prints():
        _use_compilation_cache()
        mesh = _mesh()
        if mode.flag is not None:
            mesh.check_rows_whole(f"--{mode.flag.name}")
        loaded = load_model(workdir.path, _STEP.value, mesh=functools.partial(mesh.mesh_for, say=_say), report=_say)
        times.lap("load")
        mode.run(Subject(loaded, workdir, loaded.mesh, _DATA_PATH.value))
        times.lap("evaluation")
        times.report()


if __name__ == "__main__":
    program.run(main, required=["workdir"], interrupts="raise", at_end=cluster.leave)
