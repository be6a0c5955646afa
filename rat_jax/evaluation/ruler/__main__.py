"""Writes examples of RULER's tasks as JSON lines, to fine-tune on or to answer.

  python -m rat_jax.evaluation.ruler --tokenizer=bytes --task=niah_single_1 --length=1024 --num=1000 \\
      --split=train --templates=own --out=train.jsonl

A line has `prompt`, `answer` (what follows the prompt), `answers` (one by one, as scoring takes them), `task`, `index`,
`depth` and `depths` (of the first needle asked for and of all), the tokens of the prompt, and all settings. The file is
complete or not there. Exit codes: 0; 2 if flags or files do not fit; 1 if the system refused the file on the way.
"""

import argparse
import json
import sys
from collections.abc import Sequence

import tqdm

from rat_jax import program
from rat_jax.data import DataError
from rat_jax.data.tokenizer import Tokenizer
from rat_jax.data.tokenizer_choice import parse_tokenizer
from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.ruler.evaluation import describe, find_templates, task_names
from rat_jax.evaluation.ruler.examples import TASKS, Settings, make_example
from rat_jax.evaluation.ruler.haystacks import Essay
from rat_jax.evaluation.ruler.templates import OWN
from rat_jax.evaluation.ruler.words import find_words
from rat_jax.files import check_new_file, write_lines
from rat_jax.paths import local_path


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = program.ArgumentParser(
        prog="python -m rat_jax.evaluation.ruler",
        description="Writes examples of RULER's tasks as JSON lines.",
        epilog=f"tasks: {', '.join(TASKS)}; ruler for all",
    )
    parser.add_argument(
        "--tokenizer", required=True, help="bytes, a tokenizer.json, a SentencePiece .model, or a corpus's folder"
    )
    parser.add_argument("--eos_token", help="the token that ends a document, if the tokenizer's file does not say it")
    parser.add_argument("--task", required=True, help="one or several with commas between, whose examples alternate")
    parser.add_argument("--length", required=True, type=int, help="tokens of a prompt and the room for its answer")
    parser.add_argument("--num", required=True, type=int, help="examples of each task")
    parser.add_argument("--split", required=True, choices=("train", "validation"), help="which share nothing")
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    parser.add_argument("--out", required=True, help="the file to write")
    parser.add_argument(
        "--templates",
        default="harness",
        help="harness: RULER's own sentences (default); own: short ones of this package",
    )
    parser.add_argument("--words", help="generated or wonderwords; left out: wonderwords for RULER's, where installed")
    parser.add_argument("--essay", help="text to hide needles in: a file, a folder, or another source of data.prepare")
    parser.add_argument("--depths", type=int, help="depths that the first needle takes by turns; left out: at random")
    parser.add_argument("--answer_tokens", type=int, help="room for the answer; left out: RULER's of each task")
    parser.add_argument(
        "--bos", action="store_true", help="count a BOS among the tokens of a prompt; it is not written"
    )
    return parser.parse_args(arguments)


def _tokenizer(flags: argparse.Namespace) -> Tokenizer:
    tokenizer = parse_tokenizer(flags.tokenizer, flags.eos_token)
    if isinstance(tokenizer, int):
        raise DataError(
            f"--tokenizer {flags.tokenizer} is to be trained, and there is no text here: name the folder of a corpus "
            f"that was prepared with it"
        )
    return tokenizer


def _settings(flags: argparse.Namespace) -> Settings:
    templates = find_templates(flags.templates)
    return Settings(
        context_length=flags.length,
        split=flags.split,
        seed=flags.seed,
        templates=templates,
        words=find_words(flags.words, official=templates is not OWN),
        essay=None if flags.essay is None else Essay.read(flags.essay),
        num_depths=flags.depths,
        answer_tokens=flags.answer_tokens,
        bos=flags.bos,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program; None reads the flags of this process."""
    flags = _parse(arguments)
    tasks = task_names(flags.task.split(","))
    if flags.num < 1:
        raise EvaluationError(f"--num must be 1 or more, got {flags.num}")
    out = local_path(flags.out, "--out")
    check_new_file(out)
    tokenizer, settings = _tokenizer(flags), _settings(flags)
    facts = {"length": flags.length, **describe(settings, tokenizer)}
    del facts["answer_tokens"]  # each example says its own
    num = flags.num * len(tasks)
    examples = (make_example(task, index, tokenizer, settings) for index in range(flags.num) for task in tasks)
    bar = tqdm.tqdm(examples, total=num, disable=not sys.stderr.isatty(), leave=False)
    write_lines(out, (json.dumps(example.as_json() | facts, ensure_ascii=False) for example in bar))
    print(f"{out}: {num} examples")


if __name__ == "__main__":
    sys.exit(program.exit_code(main))
