"""Greedy answers of a model to the prompts of a file, beside the references, and how alike they are."""

import dataclasses
import hashlib
import importlib.util
import json
import pathlib
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import tqdm

from rat_jax.checkpoints.store import LoadedModel
from rat_jax.data import DataError
from rat_jax.data.answer_mask import cut_middle, prompt_ids
from rat_jax.data.chat_template import ChatTemplate, load_chat_template
from rat_jax.data.document import ReadOptions
from rat_jax.data.example import Example, ExampleReader
from rat_jax.data.sources import parse_source
from rat_jax.data.tokenizer import Tokenizer
from rat_jax.errors import RunStopped
from rat_jax.evaluation import results
from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.subject import Subject, check_same_on_all_hosts
from rat_jax.evaluation_config import NEW_TOKENS
from rat_jax.files import FileError, write_json
from rat_jax.model import LanguageModel
from rat_jax.sampling import generate
from rat_jax.sampling.output_file import OutputFile
from rat_jax.sampling.prompts import Prompt

_SHOWN = 200  # characters of a prompt's end that stand beside its answer
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclasses.dataclass(frozen=True)
class AnswerSettings:
    """What answers depend on, beside the model and the prompts."""

    context_length: int  # tokens of a prompt and its answer together
    max_new_tokens: int = NEW_TOKENS  # of an answer; a prompt has the rest, and loses its middle where it is longer

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise EvaluationError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if self.room < 1:
            raise EvaluationError(
                f"answers of up to {self.max_new_tokens} tokens leave no room for a prompt in a context of "
                f"{self.context_length}: lower max_new_tokens, or choose a longer context"
            )

    @property
    def room(self) -> int:
        """Tokens of a prompt."""
        return self.context_length - self.max_new_tokens


class Metric(NamedTuple):
    """How alike an answer and a reference are, from 0 to 1."""

    name: str
    of: Callable[[str, str], float]


@dataclasses.dataclass(frozen=True)
class Questions:
    """The prompts of a file, as ids that leave room for an answer."""

    path: pathlib.Path
    examples: list[Example]
    ids: list[list[int]]
    num_cut: int

    @classmethod
    def read(
        cls,
        path: pathlib.Path,
        template: ChatTemplate | None,
        tokenizer: Tokenizer,
        room: int,
        limit: int | None,
    ) -> "Questions":
        """Reads the records of a file (`rat_jax.data.example`), chats by a template.

        Args:
          path: of JSON lines, or what else holds records.
          template: of the model's chats; None: there is none.
          tokenizer: of the model.
          room: tokens of a prompt; longer ones lose their middle, as in training.
          limit: so many records alone, the first ones. None: all.

        Raises:
          DataError: naming the record that cannot be used.
          EvaluationError: if there is none.
        """
        reader = ExampleReader(template)
        options = ReadOptions(field="text", document_separator=None, invalid_utf8="refuse", read_record=reader)
        source = parse_source(str(path), options)
        if not source.has_records:
            raise EvaluationError(f"{path} holds text: answers are measured on JSON lines with prompt and answer")
        if limit is not None and limit < 1:
            raise EvaluationError(f"limit must be 1 or more, got {limit}")
        examples, ids, num_cut = [], [], 0
        for document in source.documents():
            if len(examples) == limit:
                break
            example = Example.from_text(document.text)
            try:
                prompt, _ = prompt_ids(example, tokenizer)
            except DataError as error:
                raise DataError(f"{document.name}: {error}") from None
            examples.append(example)
            ids.append(cut_middle(prompt, room))
            num_cut += len(prompt) > room
        if not examples:
            raise EvaluationError(f"{path} holds no records with a prompt and an answer")
        return cls(path, examples, ids, num_cut)

    @property
    def hash(self) -> str:
        """SHA-256 of prompts and references, in hexadecimal."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(f"{example.to_text()}\n".encode())
        return digest.hexdigest()

    def prompts(self) -> list[Prompt]:
        """What stands beside each answer: the number of its record, the end of the prompt, its hash, the references."""
        return [
            Prompt(
                text=example.prompt,
                place=f"record {number} of {self.path}",
                fields={
                    "record": number,
                    "prompt_hash": hashlib.sha256(example.key.encode()).hexdigest(),
                    "prompt_end": example.prompt[-_SHOWN:],
                    "references": list(example.answers),
                },
            )
            for number, example in enumerate(self.examples, start=1)
        ]


def evaluate_answers(
    subject: Subject,
    path: pathlib.Path,
    settings: AnswerSettings,
    *,
    batch_tokens: int,
    limit: int | None,
    print_json: bool,
) -> None:
    """Answers the prompts of a file, compares the answers with the references, prints and writes the results.

    The workdir gets answers-STEP-FILE-DIGEST.jsonl, a line for each prompt, and .json with the figures. Answers that an
    earlier start has written there are not made again.

    Args:
      subject: what is evaluated.
      path: of the file.
      settings: what answers depend on.
      batch_tokens: tokens of all prompts that are answered at a time, their answers included.
      limit: so many records alone, the first ones. None: all.
      print_json: instead of the table.

    Raises:
      EvaluationError, DataError: if the file, a package or the settings do not fit.
      SamplingError, RunStopped: as of `rat_jax.sampling.generate`.
    """
    metrics = find_metrics()
    loaded, tokenizer = subject.loaded, subject.tokenizer()
    template = load_chat_template(subject.workdir.tokenizer)
    questions = Questions.read(path, template, tokenizer, settings.room, limit)
    measured = {
        "file": str(path),
        "data_hash": questions.hash,
        "tokenizer_hash": tokenizer.hash,
        "limit": limit,
        **dataclasses.asdict(settings),
    }
    check_same_on_all_hosts({"SHA-256 of the prompts and answers": questions.hash})
    digest = results.digest({**measured, "file": path.name})
    out = subject.workdir.path / f"answers-{loaded.step}-{results.part_of_a_name(path.stem)}-{digest}.jsonl"
    answers = predict(loaded, questions, tokenizer, settings, out, batch_tokens=batch_tokens)
    if jax.process_index() != 0:
        return
    values = {
        **results.of_checkpoint(loaded),
        "measured": measured,
        "answers": str(out),
        "num_prompts": len(answers),
        "num_cut": questions.num_cut,
        "scores": score(answers, [example.answers for example in questions.examples], metrics),
    }
    print(json.dumps(values) if print_json else table(values), flush=True)
    try:
        write_json(out.with_suffix(".json"), values)
    except FileError as error:
        raise RunStopped(str(error)) from None
    print(f"written to {out} and {out.with_suffix('.json')}", file=sys.stderr)


def predict(
    loaded: LoadedModel,
    questions: Questions,
    tokenizer: Tokenizer,
    settings: AnswerSettings,
    out: pathlib.Path,
    *,
    batch_tokens: int,
) -> list[str]:
    """The greedy answer to each prompt, up to the end that answers were learned with.

    Answers that are in the file `out` are taken from there, and it gets the others as they are made; of several hosts
    the first alone has them all. The rest is as of `evaluate_answers`.
    """
    prompts = questions.prompts()
    file = OutputFile(out, prompts, remedy="remove it, and all answers are made anew")
    file.go_on({"step": loaded.step, "tokenizer_hash": tokenizer.hash, **dataclasses.asdict(settings)})
    num_all = len(questions.ids)
    if file.num_done:
        print(f"{file.num_done:,} of {num_all:,} answers are in {out}", file=sys.stderr)
    with tqdm.tqdm(total=num_all, initial=file.num_done, unit="answer", disable=not sys.stderr.isatty()) as bar:

        def add(index: int, text: str) -> None:
            file.write(index, prompts[index], text)
            bar.update()

        try:
            if file.num_done < num_all:
                answer(
                    loaded.model,
                    questions,
                    tokenizer,
                    settings.max_new_tokens,
                    batch_tokens=batch_tokens,
                    first=file.num_done,
                    on_answer=add,
                )
        except KeyboardInterrupt:
            done = f"{file.num_done:,} of {num_all:,} answers are in {out}"
            print(f"interrupted: {done}; the same command goes on", file=sys.stderr)
            raise
    return file.completions


def answer(
    model: LanguageModel,
    questions: Questions,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    *,
    batch_tokens: int,
    on_answer: Callable[[int, str], None],
    first: int = 0,
) -> None:
    """Greedy answers to the prompts from number `first` on, each given to `on_answer` with its number when it is there.

    The rest is as of `evaluate_answers`.
    """
    new: dict[int, list[int]] = {}

    def add(index: int, ids: list[int]) -> None:
        new.setdefault(index, []).extend(ids)
        if not ids:
            on_answer(index, tokenizer.decode(new.pop(index)))

    longest = max(map(len, questions.ids)) + max_new_tokens
    generate(
        model,
        questions.ids,
        max_new_tokens=max_new_tokens,
        eos_id=tokenizer.eos_id,
        batch_size=max(1, batch_tokens // longest),
        first=first,
        on_tokens=add,
    )


def find_metrics() -> list[Metric]:
    """All metrics.

    Raises:
      EvaluationError: if the package of one is not installed.
    """
    if importlib.util.find_spec("rouge_score") is None:
        raise EvaluationError("ROUGE-L needs the package rouge_score: pip install -r requirements-eval.txt")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])

    def rouge_l(answer: str, reference: str) -> float:
        return scorer.score(reference, answer)["rougeL"].fmeasure

    return [Metric("rouge_l", rouge_l), Metric("token_f1", token_f1), Metric("exact_match", exact_match)]


def score(answers: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[Metric]) -> dict[str, float]:
    """The mean of each metric over all answers, in percent; of several references the most alike counts."""
    pairs = list(zip(answers, references, strict=True))
    return {
        metric.name: 100 * sum(max(metric.of(answer, text) for text in texts) for answer, texts in pairs) / len(pairs)
        for metric in metrics
    }


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words, counted as often as they occur (arXiv 1606.05250).

    Case, punctuation and articles do not count. Without a word on either side it is 1, on one side 0.
    """
    said, wanted = Counter(_words(answer)), Counter(_words(reference))
    if not said or not wanted:
        return float(said == wanted)
    return 2 * (said & wanted).total() / (said.total() + wanted.total())


def exact_match(answer: str, reference: str) -> float:
    """1 if the words are the same in the same order, else 0; as in `token_f1`."""
    return float(_words(answer) == _words(reference))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def table(values: dict[str, Any]) -> str:
    """The results of `evaluate_answers` as text."""
    measured, scores = values["measured"], values["scores"]
    room = measured["context_length"] - measured["max_new_tokens"]
    return "\n".join(
        [
            f"answers to the {values['num_prompts']:,} prompts of {measured['file']}, {values['num_cut']:,} of them "
            f"cut in the middle to {room:,} tokens",
            f"{'ROUGE-L':>12} {'token F1':>12} {'exact match':>12}",
            " ".join(f"{scores[name]:>12.2f}" for name in ("rouge_l", "token_f1", "exact_match")),
        ]
    )
