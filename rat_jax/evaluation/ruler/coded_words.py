"""Frequent words: which three made-up words come most often, their counts a zeta distribution (RULER, section 3.3)."""

import math
import random

from rat_jax.evaluation.ruler.draft import Draft, Materials, Rendered

_NUM_ANSWERS = 3
_DOTS = "..."  # the most frequent of all, which does not count
_WORD_LETTERS = 6
_TOKENS_A_WORD = 50  # of the context for each different word


class CodedWordsDraft(Draft):
    """The size n gives the word of rank k a count of floor(n k^-2 / zeta(2)), the dots the first rank."""

    least = 74  # n (4^-2 - 5^-2) / zeta(2) > 1: the last answer comes more often than what follows
    takes_filler = True

    def __init__(self, materials: Materials):
        self._templates = materials.templates
        num_words = max(2 * _NUM_ANSWERS, materials.context_length // _TOKENS_A_WORD - 1)
        self._words = [materials.items.letters(_WORD_LETTERS, upper=False) for _ in range(num_words)]
        self._seed = materials.items.rng.getrandbits(64)
        self.answers = tuple(self._words[:_NUM_ANSWERS])

    def render(self, size: int, num_filler: int = 0) -> Rendered:
        text = [_DOTS] * num_filler
        for rank, word in enumerate([_DOTS, *self._words], start=1):
            text += [word] * int(size * 6 / (math.pi * rank) ** 2)
        random.Random(f"{self._seed} {len(text)}").shuffle(text)
        prompt = self._templates.coded_words.prompt(" ".join(text), query="", count=_NUM_ANSWERS)
        return Rendered(prompt, ())
