"""Keys, values and names: each belongs to one split."""

import itertools
import random
import re

import pytest

from rat_jax.evaluation.ruler.items import Items, split_of
from rat_jax.evaluation.ruler.words import GeneratedWords, Words


class Listed(Words):
    source = "listed"
    listed = tuple(f"word{number}" for number in range(100))

    def pair(self, rng):
        return f"{rng.choice(self.listed)}-{rng.choice(self.listed)}"


def test_numbers_of_both_splits_are_all_numbers():
    drawn = {split: Items(random.Random(0), split, GeneratedWords()) for split in ("train", "validation")}
    numbers = {split: {items.number(3) for _ in range(400)} for split, items in drawn.items()}
    assert all(len(found) == 400 for found in numbers.values())  # none twice
    assert numbers["train"] & numbers["validation"] == set()
    assert all(100 <= int(number) < 1000 for found in numbers.values() for number in found)


def test_half_of_all_items_belong_to_each_split():
    assert 4800 < sum(split_of(str(number)) == "train" for number in range(10_000)) < 5200


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("numbers", r"[1-9]\d{6}"),
        ("uuids", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"),
        ("words", r"([bdfgklmnprstvz][aeiou]){3}-([bdfgklmnprstvz][aeiou]){3}"),
    ],
)
def test_kinds(kind, pattern):
    items = Items(random.Random(0), "train", GeneratedWords())
    assert all(re.fullmatch(pattern, items.draw(kind)) for _ in range(20))
    assert re.fullmatch("[A-Z]{5}", items.letters(5, upper=True))
    assert re.fullmatch("[a-z]{6}", items.letters(6, upper=False))


def test_words_of_a_list_come_first():
    words = {
        split: list(itertools.islice(Items(random.Random(0), split, Listed()).words(), 120))
        for split in ("train", "validation")
    }
    listed = {split: [word for word in found if word.startswith("word")] for split, found in words.items()}
    assert sorted(listed["train"] + listed["validation"]) == sorted(Listed.listed)
    for split, found in words.items():
        assert found[: len(listed[split])] == listed[split]
        assert len(set(found)) == 120
