"""Scores of a prediction: RULER's two, and the exact one of the RAT release."""

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")
METRICS = ("string_match_all", "string_match_part", "exact_match")


def found(prediction: str, answers: Sequence[str]) -> list[bool]:
    """Whether each answer stands anywhere in the prediction, in any case of its letters."""
    text = _CONTROL.sub("\n", prediction).lower()
    return [answer.lower() in text for answer in answers]


def scores(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """The score of each metric, from 0 to 1.

    string_match_all    share of the answers that stand in the prediction: RULER's for all tasks here
    string_match_part   1 if any of them does: RULER's for its questions about documents
    exact_match         share of the answers that are a part of the prediction, cut at its commas: the release's, for
                        models that were fine-tuned on the task
    """
    hits = found(prediction, answers)
    parts = {part.strip() for part in prediction.split(",")}
    return {
        "string_match_all": sum(hits) / len(hits),
        "string_match_part": float(any(hits)),
        "exact_match": len(parts & set(answers)) / len(answers),
    }
