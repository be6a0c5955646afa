"""Words for keys and for lists to count: generated ones, or those of the package that RULER takes its from."""

import abc
import importlib.metadata
import importlib.resources
import importlib.util
import random

from rat_jax.evaluation.errors import EvaluationError

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"
_PACKAGE = "wonderwords"


class Words(abc.ABC):
    """Where words come from."""

    source: str  # its name, and its version where it is a package
    listed: tuple[str, ...]  # words for lists to count; when they are used up, generated ones follow

    @abc.abstractmethod
    def pair(self, rng: random.Random) -> str:
        """A key: two words with a hyphen between."""


class GeneratedWords(Words):
    """Words of three syllables that no language has: no list is needed, and none is a part of another."""

    source = "generated"
    listed = ()

    def pair(self, rng: random.Random) -> str:
        return f"{generated_word(rng)}-{generated_word(rng)}"


class PackageWords(Words):
    """The English words of the package `wonderwords`: adjective-noun pairs as keys, as RULER has them."""

    def __init__(self):
        """Raises an `EvaluationError` if the package is not installed."""
        if importlib.util.find_spec(_PACKAGE) is None:
            raise EvaluationError(f"the words {_PACKAGE} need the package: pip install {_PACKAGE}; or choose generated")
        self.source = f"{_PACKAGE} {importlib.metadata.version(_PACKAGE)}"
        self._nouns, self._adjectives, verbs = (_lines(f"{kind}list.txt") for kind in ("noun", "adjective", "verb"))
        self.listed = tuple(sorted({*self._nouns, *self._adjectives, *verbs}))

    def pair(self, rng: random.Random) -> str:
        return f"{rng.choice(self._adjectives)}-{rng.choice(self._nouns)}"


def find_words(name: str | None, official: bool) -> Words:
    """The words of a name, `generated` or `wonderwords`.

    Args:
      name: None takes those of the package for official prompts where it is installed, else generated ones.
      official: whether prompts are RULER's own.

    Raises:
      EvaluationError: if the name is unknown or the package is missing.
    """
    if name is None:
        name = _PACKAGE if official and importlib.util.find_spec(_PACKAGE) is not None else GeneratedWords.source
    match name:
        case "generated":
            return GeneratedWords()
        case "wonderwords":
            return PackageWords()
    raise EvaluationError(f"words must be generated or {_PACKAGE}, got {name!r}")


def generated_word(rng: random.Random) -> str:
    """Three syllables of a consonant and a vowel: one of 343,000."""
    return "".join(rng.choice(letters) for letters in (_CONSONANTS, _VOWELS) * 3)


def _lines(name: str) -> list[str]:
    text = importlib.resources.files(_PACKAGE).joinpath("assets", name).read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip()]
