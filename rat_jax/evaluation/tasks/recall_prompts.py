"""Prompts and scores of the recall tasks of Just Read Twice (arXiv 2407.05483), where each document is read once.

The harness's own swde, fda and squad_completion ask without a cut and with other prompts, and differ by tens of points.
Source: github.com/HazyResearch/prefix-linear-attention, lm-eval-harness/lm_eval/tasks/based_*.
"""

import re
from typing import Any

_TRIVIAQA_MARKS = re.compile(r"\[PAR\]|\[DOC\]|\[TLE\]")  # between the parts of a document


def swde_prompt(row: dict[str, Any]) -> str:
    """A web page, then the name of one of its attributes."""
    text = _without_end(row["text"], f"{row['key']}:")
    return f"{text.strip().strip('.')}. {_capital(row['key'])}:"


def fda_prompt(row: dict[str, Any]) -> str:
    """A report, then the name of one of its attributes."""
    text = _without_end(row["text"], f"{row['key']}:")
    text = text.strip("\n").strip(".")  # spaces stay
    return f"{text}. {_capital(row['key'])}:"


def squad_prompt(row: dict[str, Any]) -> str:
    """A passage whose last sentence lacks its end, which is the answer."""
    return row["text"].strip()


def drop_prompt(row: dict[str, Any]) -> str:
    """A passage, then a question that may stand at its end already."""
    return _asked(row["context"], row["question"])


def triviaqa_prompt(row: dict[str, Any]) -> str:
    """As `drop_prompt`, without the marks between the parts of a document."""
    return _asked(_TRIVIAQA_MARKS.sub("", row["context"].strip()), row["question"])


def nq_prompt(row: dict[str, Any]) -> str:
    """A passage, then a question that may stand at its end already, spelled the same way."""
    question = row["question"].strip()
    return _joined(row["context"].strip().removesuffix(question), question)


def first_answer(row: dict[str, Any]) -> str:
    """The target: a space and the first answer."""
    return f" {row['answers'][0] if row['answers'] else 'unanswerable'}"


def value_is_in(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the generated line holds the value, in any case of letters."""
    return {"contains": _contains(results[0], [row["value"]])}


def an_answer_is_in(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the generated line holds one of the answers, in any case of letters."""
    return {"contains": _contains(results[0], row["answers"])}


def _asked(context: str, question: str) -> str:
    question = question.strip()
    return _joined(_without_end(context.strip(), question), question)


def _joined(context: str, question: str) -> str:
    return f"{context.strip().strip('.')}. {question}"


def _without_end(text: str, end: str) -> str:
    """A text without what may stand at its end, once or several times."""
    while end and text.lower().endswith(end.lower()):
        text = text[: -len(end)]
    return text


def _capital(key: str) -> str:
    return key[:1].upper() + key[1:]


def _contains(text: str, answers: list[str]) -> float:
    return float(any(re.search(re.escape(answer), text, re.IGNORECASE) for answer in answers))
