"""Common words: which ten words of a numbered list come most often (RULER, section 3.3)."""

import dataclasses
import itertools
import random

from rat_jax.evaluation.ruler.draft import Draft, Materials, Rendered

_NUM_COMMON = 10
_LONG = 4096  # tokens of a context from which on RULER repeats words more often


@dataclasses.dataclass(frozen=True)
class _Repeats:
    common: int  # how often a common word stands in the list
    other: int
    example_common: int  # the same in the solved example
    example_other: int
    example_words: int  # different ones in the solved example


_SHORT_LIST = _Repeats(common=6, other=1, example_common=3, example_other=1, example_words=20)
_LONG_LIST = _Repeats(common=30, other=3, example_common=10, example_other=3, example_words=40)


class CommonWordsDraft(Draft):
    """The size counts the different words that are not common.

    Words are repeated as in RULER: 30 and 3 times from 4,096 tokens on, else 6 times and once; so too where a
    tokenizer needs so many tokens for a word that the long list does not fit.
    """

    least = 5
    takes_filler = False

    def __init__(self, materials: Materials):
        self._templates = materials.templates
        self._seed = materials.items.rng.getrandbits(64)  # of the orders, which differ from size to size
        self._unused = materials.items.words()
        self.answers = tuple(itertools.islice(self._unused, _NUM_COMMON))
        self._example_words = list(itertools.islice(self._unused, _LONG_LIST.example_words))
        self._others: list[str] = []
        self._repeats = _LONG_LIST
        if materials.context_length < _LONG or not materials.fits(self.render(self.least).prompt):
            self._repeats = _SHORT_LIST

    def render(self, size: int, num_filler: int = 0) -> Rendered:
        self._others += itertools.islice(self._unused, max(0, size - len(self._others)))
        repeats = self._repeats
        context = self._numbered(self.answers, repeats.common, self._others[:size], repeats.other)
        prompt = self._prompt(context)
        return Rendered(self._example() + prompt, ())

    def _example(self) -> str:
        if not self._templates.worked_examples:
            return ""
        repeats = self._repeats
        words = self._example_words[: repeats.example_words]
        common, others = words[:_NUM_COMMON], words[_NUM_COMMON:]
        context = self._numbered(common, repeats.example_common, others, repeats.example_other)
        answer = " ".join(f"{number}. {word}" for number, word in enumerate(common, start=1))
        return f"{self._prompt(context)} {answer}\n"

    def _prompt(self, context: str) -> str:
        return self._templates.common_words.prompt(context, query="", count=_NUM_COMMON)

    def _numbered(self, common, common_repeats: int, others, other_repeats: int) -> str:
        words = [*common] * common_repeats + [*others] * other_repeats
        random.Random(f"{self._seed} {len(words)}").shuffle(words)
        return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))
