"""Documents cut to the part around their answer, as the recall tasks of Just Read Twice are asked.

Source: github.com/HazyResearch/prefix-linear-attention, lm-eval-harness/lm_eval/api/task.py. Its figures are for such
documents: where whole ones are longer than the context, what is asked for may be cut away.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from rat_jax.data.tokenizer import Tokenizer
from rat_jax.evaluation.errors import EvaluationError


@dataclasses.dataclass(frozen=True)
class DocumentCut:
    """Which tokens of a document are kept."""

    column: str  # that holds the document
    # Columns of which the first place in the document is the middle of the cut; none: it begins with the document.
    around: tuple[str, ...]
    reserved_tokens: int  # of the context, for question and answer
    end_mark: str | None = None  # the document ends where this stands

    def apply(self, row: Mapping[str, Any], tokenizer: Tokenizer, context_length: int) -> dict[str, Any] | None:
        """The row with its document cut; None where it is not asked at all, since an answer is one character or less.

        The cut has `context_length - reserved_tokens` tokens: half of them before the answer, and more after it where
        fewer come before. Where no answer is found in the document, its end is the middle.

        Args:
          row: of the data set. Answers may be lists, of which the first counts; `alt_answers` and `tok_pos` (of an
            answer that is not found) are looked at where the data set has these columns.
          tokenizer: that counts the tokens.
          context_length: in tokens.

        Raises:
          EvaluationError: if nothing is left of the context.
        """
        num_tokens = context_length - self.reserved_tokens
        if num_tokens < 1:
            raise EvaluationError(
                f"a context length of {context_length} has no room for a document beside the {self.reserved_tokens} "
                f"tokens of question and answer: choose a longer one"
            )
        answers = [_first(row[column]) for column in self.around]
        if any(len(answer) <= 1 for answer in answers):
            return None
        document = row[self.column]
        if self.end_mark is not None:
            document = document.partition(self.end_mark)[0]
        document = document.strip()
        place = self._place(document, answers, row.get("alt_answers") or [])
        middle = len(tokenizer.encode(document[:place]))
        if place == -1 and row.get("tok_pos") is not None and middle > num_tokens:
            middle = row["tok_pos"]
        ids = tokenizer.encode(document)
        start = max(0, middle - num_tokens // 2)
        return {**row, self.column: tokenizer.decode(ids[start : start + num_tokens])}

    def _place(self, document: str, answers: list[str], others: list[str]) -> int:
        """The character where an answer begins; -1, which keeps all but the last one, if there is none."""
        if not answers:
            return 0
        places = [found.start() for answer in answers if (found := _search(answer, document))]
        if places:
            return min(places)
        return next((found.start() for other in others if (found := _search(other, document))), -1)


def _first(value: str | list[str]) -> str:
    if isinstance(value, str):
        return value
    return value[0] if value else ""


def _search(text: str, document: str) -> re.Match | None:
    return re.search(re.escape(text), document, re.IGNORECASE)
