"""Data sets that arXiv 2507.04416 fine-tunes on, from their published rows to JSON lines of examples.

  python -m rat_jax.data.sft_tasks qmsum --source hf:pszemraj/qmsum-cleaned:no-prefix:train --out data/qmsum/train.jsonl

Each row becomes {"prompt": "...", "answer": ["..."]}, which `rat_jax.data.prepare --rows` and `eval.py --sft` read.
"""

import argparse
import dataclasses
import json
import pathlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tqdm

from rat_jax.data import DataError
from rat_jax.data.document import ReadOptions, listed
from rat_jax.data.sources import Source, parse_source
from rat_jax.files import check_new_file, write_lines
from rat_jax.paths import local_path
from rat_jax.program import ArgumentParser, exit_code

_NARRATIVEQA = (
    "NarrativeQA is huggingface.co/datasets/deepmind/narrativeqa: with a network give --source "
    "hf:deepmind/narrativeqa:default:train (or validation, test), else download the Parquet files of its folder data "
    "and name those of a split, --source 'narrativeqa/data/train-*.parquet'"
)
_QMSUM = (
    "QMSum as the paper trains on it is huggingface.co/datasets/pszemraj/qmsum-cleaned: with a network give --source "
    "hf:pszemraj/qmsum-cleaned:no-prefix:train (or validation), else download the files of no-prefix and name those of "
    "a split. The paper's test rows are qmsum.jsonl of LongBench, huggingface.co/datasets/THUDM/LongBench"
)
_WIKISUM = (
    "WikiSum is huggingface.co/datasets/d0rj/wikisum: with a network give --source hf:d0rj/wikisum, and for the others "
    "hf:d0rj/wikisum:default:validation or :test, else download the files of its folder data and name those of a split"
)


@dataclasses.dataclass(frozen=True)
class Question:
    """What a row asks."""

    context: str
    question: str
    answers: list[str]  # each as good as the others


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set and the form of its prompts."""

    context_name: str  # what a prompt calls the context
    read: Callable[[Any, str], Question]  # a row, and its place for messages
    where: str  # the files are published

    def example(self, row: Any, name: str) -> str:
        """The line of a row; empty if it has no answer or no context.

        Raises:
          DataError: if the row lacks a column.
        """
        asked = self.read(row, name)
        answers = [answer.strip() for answer in asked.answers if answer.strip()]
        if not answers or not asked.context.strip():
            return ""
        prompt = f"{self.context_name}: {asked.context}\n\nQuestion: {asked.question}\n\nAnswer:"
        return json.dumps({"prompt": prompt, "answer": answers})


def _narrativeqa(row: Any, name: str, with_story: bool) -> Question:
    summary = _column(row, "document.summary.text", name)
    context = f"{summary}\n\n{_column(row, 'document.text', name)}" if with_story else summary
    answers = _column(row, "answers", name, list)
    return Question(context, _column(row, "question.text", name), [_column(answer, "text", name) for answer in answers])


def _qmsum(row: Any, name: str) -> Question:
    if isinstance(row, dict) and "answers" in row:  # of LongBench
        answers = [_column({"answers": answer}, "answers", name) for answer in _column(row, "answers", name, list)]
        return Question(_column(row, "context", name), _column(row, "input", name), answers)
    return Question(_column(row, "input", name), _column(row, "prompt", name), [_column(row, "output", name)])


def _wikisum(row: Any, name: str) -> Question:
    return Question(_column(row, "article", name), _column(row, "title", name), [_column(row, "summary", name)])


TASKS: dict[str, Task] = {
    "narrativeqa_summary": Task("Story", lambda row, name: _narrativeqa(row, name, False), _NARRATIVEQA),
    "narrativeqa_full": Task("Story", lambda row, name: _narrativeqa(row, name, True), _NARRATIVEQA),
    "qmsum": Task("Transcript", _qmsum, _QMSUM),
    "wikisum": Task("Article", _wikisum, _WIKISUM),
}


def _column(row: Any, column: str, name: str, kind: type = str) -> Any:
    """What a row holds in a column, or in a field of one (`document.text`); of a text that is null an empty one."""
    value = row
    for key in column.split("."):
        if not isinstance(value, dict) or key not in value:
            there = listed(value) if isinstance(value, dict) else f"a {type(value).__name__}"
            raise DataError(f"{name} has no column {column} (it has: {there})")
        value = value[key]
    if value is None and kind is str:
        return ""
    if not isinstance(value, kind):
        raise DataError(f"{name}: column {column} must be {kind.__name__}, got {type(value).__name__}")
    return value


def convert(task_name: str, specs: Sequence[str], out: pathlib.Path, sample: int | None) -> int:
    """Writes the JSON lines of a task.

    Args:
      task_name: of `TASKS`.
      specs: sources as of `rat_jax.data.prepare`, whose rows have the data set's own columns.
      out: the file to make; its folder is made, too.
      sample: so many rows alone, drawn with equal chances, the same each time, and in their order. None: all.

    Returns:
      How many lines were written.

    Raises:
      DataError: naming what is missing, and where the data set comes from.
      FileError: if the system refuses.
    """
    task = TASKS[task_name]
    if not specs:
        raise DataError(f"--source is missing: {task.where}")
    if sample is not None and sample < 1:
        raise DataError(f"--sample must be 1 or more, got {sample}")
    check_new_file(out)
    options = ReadOptions(field="text", document_separator=None, invalid_utf8="refuse", read_record=task.example)
    try:
        sources = [parse_source(spec, options) for spec in specs]
        if texts := [spec for spec, source in zip(specs, sources, strict=True) if not source.has_records]:
            raise DataError(f"source {texts[0]} holds text, not rows with columns")
        lines = list(_drawn(_lines(sources), sample)) if sample is not None else _lines(sources)
        return write_lines(out, _some(lines))
    except DataError as error:
        raise DataError(f"{error}. {task.where}") from None


def _lines(sources: Sequence[Source]) -> Iterator[str]:
    counts = [source.num_documents for source in sources]
    num_left_out = 0
    with tqdm.tqdm(unit="row", desc="converting", total=None if None in counts else sum(counts)) as bar:
        for source in sources:
            for document in source.documents():
                bar.update()
                if document.text:
                    yield document.text
                else:
                    num_left_out += 1
    if num_left_out:
        print(f"{num_left_out:,} rows are left out: they have no answer, or no context")


def _drawn(lines: Iterator[str], count: int) -> list[str]:
    """`count` lines with equal chances, in their order, no more than these in memory."""
    rng, kept = random.Random(0), []
    for number, line in enumerate(lines):
        if number < count:
            kept.append((number, line))
        elif (place := rng.randrange(number + 1)) < count:
            kept[place] = (number, line)
    return [line for _, line in sorted(kept)]


def _some(lines: Iterable[str]) -> Iterator[str]:
    """The lines, of which there must be one."""
    is_empty = True
    for line in lines:
        is_empty = False
        yield line
    if is_empty:
        raise DataError("the sources hold no rows with an answer")


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    return exit_code(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
    parser = ArgumentParser(
        prog="python -m rat_jax.data.sft_tasks",
        description="Turns published data sets into JSON lines of prompts and answers.",
        epilog="\n".join(f"{name}: {task.where}." for name, task in TASKS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--source", action="extend", nargs="+", default=[], help="as of rat_jax.data.prepare")
    parser.add_argument("--out", required=True, help="the file of JSON lines to make")
    parser.add_argument("--sample", type=int, help="so many rows alone, the same each time; left out: all")
    flags = parser.parse_args(arguments)
    out = local_path(flags.out, "--out")
    count = convert(flags.task, flags.source, out, flags.sample)
    print(f"{count:,} examples are in {out}")


if __name__ == "__main__":
    sys.exit(main())
