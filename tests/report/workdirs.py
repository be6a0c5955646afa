"""Workdirs that are made up, with figures that a reader can check by head."""

import json
import math
import pathlib
from typing import Any

from rat_jax.checkpoints.workdir import Workdir
from rat_jax.data.tokenizer import ByteTokenizer, Tokenizer
from rat_jax.report import read_runs, render
from tests.report.html_page import Page
from tests.tiny_run import tiny_config

HARNESS = "Tasks of the lm-evaluation-harness"
SECTIONS = ["Runs", "Training", "Perplexity", "Tasks", "Speed and memory", "Config"]


def training(step: int, loss: float, **more: Any) -> dict[str, Any]:
    """A record of a training step."""
    return {"step": step, "loss": loss + 1, "mean_loss": loss, "tokens": step * 128, **more}


def validation(step: int, loss: float, fraction: float = 1.0) -> dict[str, Any]:
    """A record of a validation."""
    return {"step": step, "validation_loss": loss, "validation_perplexity": 0.0, "validation_fraction": fraction}


RECORDS = (
    *(training(1 + i, 3.0 - i / 10, tokens_per_sec=1000.0 + 100 * i, mfu=0.3 + i / 100) for i in range(6)),
    validation(4, 2.75, 0.125),
    validation(6, 2.625, 0.125),
)


def make_workdir(
    path: pathlib.Path,
    *,
    records: tuple[dict[str, Any], ...] = RECORDS,
    saved_step: int | None = 6,
    tokenizer: Tokenizer | None = None,
    corpus: pathlib.Path | str = "/data/gone",
    log: bytes | None = None,
    **changes: Any,
) -> pathlib.Path:
    """A run of `tiny_config` with `changes`; `log` is the whole of log.jsonl instead of the records."""
    workdir = Workdir(path)
    workdir.mark(tiny_config(corpus, **{"model__pattern": ("attention",), **changes}), saved_step)
    workdir.save_tokenizer(tokenizer or ByteTokenizer())
    content = b"".join(json.dumps(record).encode() + b"\n" for record in records) if log is None else log
    workdir.log_file.write_bytes(content)
    return path


def evaluation(length: int, loss: float, bits: float | None = None, targets: int = 800, fraction: float = 1.0) -> dict:
    """Figures of a context length; the loss by position falls from loss + 1 to loss."""
    return {
        "context_length": length,
        "split_fraction": fraction,
        "num_targets": targets,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": bits,
        "loss_by_position": [
            {"first": 0, "last": 3, "num_targets": 100.0, "loss": loss + 1},
            {"first": 4, "last": 11, "num_targets": 0.0, "loss": None},
            {"first": 12, "last": length - 1, "num_targets": 700.0, "loss": loss},
        ],
    }


def add_evaluations(path: pathlib.Path, *evaluations: dict, step: int = 6, data: str = "/data/mine") -> None:
    """An evaluation-*.json as eval.py writes it."""
    values = {"checkpoint": "x", "step": step, "data_path": data, "data_hash": f"hash of {data}", "trained_length": 16}
    name = f"evaluation-{step}-{len(list(path.iterdir()))}.json"
    (path / name).write_text(json.dumps(values | {"evaluations": list(evaluations)}))


def add_tasks(
    path: pathlib.Path,
    tasks: dict[str, Any],
    *,
    step: int = 6,
    name: str = "tasks-6.json",
    text: dict[str, dict[str, Any]] | None = None,
    means: dict[str, float] | None = None,
    **measured: Any,
) -> None:
    """A tasks-*.json.

    Args:
      path: the workdir.
      tasks: (value, standard error, documents), or the message of a failure, by name.
      step: of the checkpoint.
      name: of the file.
      text: how texts were read, by task.
      means: of groups.
      **measured: the command's settings.
    """
    entries = {}
    for task, figures in tasks.items():
        own = {"settings": (text or {}).get(task, {})}
        if isinstance(figures, str):
            entries[task] = own | {"error": figures}
            continue
        value, error, num = figures
        entries[task] = own | {
            "results": {task: {"alias": task, "acc,none": value, "acc_stderr,none": error, "sample_len": 7}},
            "n-samples": {task: {"original": 1000, "effective": num}},
            "higher_is_better": {task: {"acc": True}},
            "num_truncated": 0,
        }
    settings = {"tokenizer_hash": path.name, "num_fewshot": None, "limit": 100} | measured
    (path / name).write_text(json.dumps({"step": step, "measured": settings, "tasks": entries, "group_means": means}))


def add_scores(path: pathlib.Path, title: str, rows: list[dict[str, Any]], name: str = "ruler-6.json", **measured):
    """A results file of the general form."""
    (path / name).write_text(json.dumps({"step": 6, "measured": measured, "scores": {"title": title, "rows": rows}}))


def add_lengths(path: pathlib.Path, within: float, beyond: float | None, *, trained: int = 16, **changes: Any) -> None:
    """A length_generalization-*.json as eval.py --length_generalization writes it."""
    figures = {
        "step": 6,
        "data_path": "/data/mine",
        "data_hash": "hash of /data/mine",
        "trained_length": trained,
        "context_length": 64,
        "positions": "row",
        "split_fraction": 1.0,
        "chunk_tokens": 16,
        "num_targets": 1600,
        "loss": 2.0,
        "loss_within": within,
        "loss_beyond": beyond,
        "loss_by_position": [
            {"first": 0, "last": 15, "num_targets": 400.0, "loss": within},
            {"first": 16, "last": 63, "num_targets": 1200.0, "loss": beyond},
        ],
    }
    (path / "length_generalization-6-mine-64-abc.json").write_text(json.dumps(figures | changes))


def add_ruler(path: pathlib.Path, *results: dict[str, Any], **measured: Any) -> None:
    """A ruler-*.json as eval.py --tasks=ruler writes it."""
    settings = {"tokenizer_hash": path.name, "seed": 0, "context_lengths": [16, 32], "num_examples": 50} | measured
    (path / "ruler-6-ruler-abc.json").write_text(json.dumps({"step": 6, "measured": settings, "results": results}))


def ruler_result(task: str, length: int, value: float, stderr: float | None) -> dict[str, Any]:
    """One of its results, in percent."""
    return {
        "task": task,
        "context_length": length,
        "num_examples": 50,
        "scores": {"string_match_all": value},
        "standard_errors": {"string_match_all": stderr},
        "predictions": [{"index": 0, "prediction": "<b>7</b>"}],
    }


def add_answers(path: pathlib.Path, **scores: float) -> None:
    """An answers-*.json as eval.py --sft writes it."""
    measured = {"file": "/data/test.jsonl", "data_hash": "ab" * 32, "tokenizer_hash": path.name, "max_new_tokens": 8}
    values = {"step": 6, "measured": measured, "num_prompts": 40, "num_cut": 1, "scores": scores}
    (path / "answers-6-test-abc.json").write_text(json.dumps(values))


def page_of(*paths: pathlib.Path) -> Page:
    """The page about workdirs."""
    return Page(render(read_runs(list(paths))))
