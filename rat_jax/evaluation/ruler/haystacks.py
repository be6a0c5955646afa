"""Texts that needles are hidden in: a line repeated, other needles, or a text of the user's."""

import abc
import bisect
import hashlib
import itertools
import pathlib
import random
import re
from collections.abc import Callable, Sequence

from rat_jax.data.corpus import METADATA_FILE
from rat_jax.data.document import ReadOptions
from rat_jax.data.sources import parse_source
from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.ruler.items import Split
from rat_jax.paths import absolute_source

_MAX_CHARACTERS = 8_000_000  # of an essay: what fills 500 contexts of 128K tokens without repeating much
_MAX_PIECE_WORDS = 40  # of text without ends of sentences
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*$")


class Haystack(abc.ABC):
    """A text of any size, in pieces between which needles may stand."""

    separator: str  # between pieces, and around needles

    @abc.abstractmethod
    def pieces(self, size: int) -> list[str]:
        """The text of a size; a larger one begins with the same text."""


class Noise(Haystack):
    """A line again and again; the size counts lines."""

    separator = "\n"

    def __init__(self, line: str):
        self._line = line

    def pieces(self, size: int) -> list[str]:
        return [self._line] * size


class Distractors(Haystack):
    """Needles that nobody asks for; the size counts them."""

    separator = "\n"

    def __init__(self, make: Callable[[], str]):
        self._make = make
        self._made: list[str] = []

    def pieces(self, size: int) -> list[str]:
        while len(self._made) < size:
            self._made.append(self._make())
        return self._made[:size]


class EssayPart(Haystack):
    """Sentences of an essay from one of them on, again from the first after the last; the size counts words."""

    separator = " "

    def __init__(self, sentences: Sequence[Sequence[str]], start: int):
        self._sentences = [*sentences[start:], *sentences[:start]]

    def pieces(self, size: int) -> list[str]:
        pieces, left = [], size
        for sentence in itertools.cycle(self._sentences):
            if left <= 0:
                return pieces
            pieces.append(" ".join(sentence[:left]))
            left -= len(sentence)
        raise AssertionError("an essay has sentences")


class Essay:
    """A text of the user's: its first half is for training, and of its second what the first does not hold."""

    def __init__(self, name: str, text: str):
        """Raises an `EvaluationError` if a split has no sentence."""
        sentences = _sentences(text.split())
        half = len(sentences) // 2
        train, known = sentences[:half], set(map(tuple, sentences[:half]))
        self.name = name
        self.hash = hashlib.sha256(text.encode()).hexdigest()
        self._splits: dict[Split, list[list[str]]] = {
            "train": train,
            "validation": [sentence for sentence in sentences[half:] if tuple(sentence) not in known],
        }
        if not all(self._splits.values()):
            raise EvaluationError(f"the essay {name} is too short: it must have two different sentences at least")

    @classmethod
    def read(cls, source: str) -> "Essay":
        """The first 8 million characters of what a `--source` of `rat_jax.data.prepare` names: a text file, a folder.

        Raises:
          EvaluationError: if it holds token ids, or too little text.
          DataError: if it cannot be read.
        """
        source = absolute_source(source, "the essay")
        if (pathlib.Path(source) / METADATA_FILE).is_file():
            raise EvaluationError(f"{source} is a prepared corpus, which holds ids: name the text that it was made of")
        texts, num_characters = [], 0
        for document in parse_source(source, ReadOptions("text", None, "refuse")).documents():
            texts.append(document.text[: _MAX_CHARACTERS - num_characters])
            num_characters += len(texts[-1])
            if num_characters >= _MAX_CHARACTERS:
                break
        return cls(source, "\n".join(texts))

    def part(self, split: Split, rng: random.Random) -> EssayPart:
        """The sentences of a split from a random one on."""
        sentences = self._splits[split]
        return EssayPart(sentences, rng.randrange(len(sentences)))


def filler_words(line: str, count: int) -> list[str]:
    """The first words of a line repeated, as one piece; no piece where there are none."""
    words = line.split()
    return [" ".join(words[index % len(words)] for index in range(count))] if count else []


def hide(needles: Sequence[tuple[float, str]], pieces: Sequence[str], separator: str) -> tuple[str, list[float]]:
    """A text with needles between its pieces.

    Args:
      needles: the depth that each is wanted at, from 0, before all pieces, to 1, after them; and the needle. Of those
        at one place the first comes first.
      pieces: the text.
      separator: between pieces and needles.

    Returns:
      The whole text, and the depth of each needle: the share of the pieces' characters that stand before it.
    """
    ends = [0, *itertools.accumulate(map(len, pieces))]
    places = [_nearest(ends, depth * ends[-1]) for depth, _ in needles]
    here: dict[int, list[str]] = {}
    for place, (_, needle) in zip(places, needles, strict=True):
        here.setdefault(place, []).append(needle)
    parts: list[str] = []
    for place in range(len(ends)):
        parts += here.get(place, [])
        parts += pieces[place : place + 1]
    return separator.join(parts), [ends[place] / max(1, ends[-1]) for place in places]


def _nearest(ends: Sequence[int], position: float) -> int:
    """The index of the number nearest to a position; the first of several."""
    above = bisect.bisect_left(ends, position)
    around = [index for index in (above - 1, above) if 0 <= index < len(ends)]
    return min(around, key=lambda index: abs(ends[index] - position))


def _sentences(words: Sequence[str]) -> list[list[str]]:
    sentences: list[list[str]] = [[]]
    for word in words:
        sentences[-1].append(word)
        if _SENTENCE_END.search(word) or len(sentences[-1]) == _MAX_PIECE_WORDS:
            sentences.append([])
    return [sentence for sentence in sentences if sentence]
