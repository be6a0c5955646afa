"""What is drawn at random: keys, values, names. Each belongs to one split, whatever the seed."""

import hashlib
import random
import string
import uuid
from collections.abc import Callable, Iterator
from typing import Literal

from rat_jax.evaluation.ruler.words import Words, generated_word

Split = Literal["train", "validation"]
Kind = Literal["words", "numbers", "uuids"]


def split_of(item: str) -> Split:
    """The split that may hold an item: half of all go to each, by their SHA-256."""
    return "train" if hashlib.sha256(item.encode()).digest()[0] < 128 else "validation"


class Items:
    """Draws items of one split, none of them twice."""

    def __init__(self, rng: random.Random, split: Split, words: Words):
        self.rng = rng
        self._split = split
        self._words = words
        self._drawn: set[str] = set()

    def draw(self, kind: Kind) -> str:
        """A key or a value: a number of seven digits, a UUID of version 4, or two words."""
        match kind:
            case "numbers":
                return self.number(7)
            case "uuids":
                return self._new(lambda: str(uuid.UUID(int=self.rng.getrandbits(128), version=4)))
            case "words":
                return self._new(lambda: self._words.pair(self.rng))

    def number(self, num_digits: int) -> str:
        """A number without a zero in front."""
        return self._new(lambda: str(self.rng.randrange(10 ** (num_digits - 1), 10**num_digits)))

    def letters(self, count: int, *, upper: bool) -> str:
        """`count` random letters."""
        alphabet = string.ascii_uppercase if upper else string.ascii_lowercase
        return self._new(lambda: "".join(self.rng.choices(alphabet, k=count)))

    def words(self) -> Iterator[str]:
        """Single words without end: those of the list in random order, then generated ones."""
        for word in self.rng.sample(self._words.listed, len(self._words.listed)):
            if split_of(word) == self._split:
                self._drawn.add(word)
                yield word
        while True:
            yield self._new(lambda: generated_word(self.rng))

    def _new(self, make: Callable[[], str]) -> str:
        while True:
            item = make()
            if item not in self._drawn and split_of(item) == self._split:
                self._drawn.add(item)
                return item
