"""Texts that needles are hidden in."""

import random

import pytest

from rat_jax.evaluation import EvaluationError
from rat_jax.evaluation.ruler.haystacks import Essay, filler_words, hide
from rat_jax.paths import PathError
from tests.commands import ROOT


@pytest.mark.parametrize(
    ("depth", "text", "found"),
    [
        (0.0, "N aaaa bb cc", 0.0),
        (0.2, "N aaaa bb cc", 0.0),
        (0.3, "aaaa N bb cc", 0.5),
        (0.7, "aaaa bb N cc", 0.75),
        (1.0, "aaaa bb cc N", 1.0),
    ],
)
def test_a_needle_stands_at_the_nearest_seam(depth, text, found):
    assert hide([(depth, "N")], ["aaaa", "bb", "cc"], " ") == (text, [found])


def test_needles_at_one_place_keep_their_order():
    assert hide([(1.0, "Z"), (0.5, "X"), (0.5, "Y")], ["aa", "bb"], "|") == ("aa|X|Y|bb|Z", [1.0, 0.5, 0.5])


def test_filler():
    assert filler_words("a b c", 0) == []
    assert filler_words("a b c", 5) == ["a b c a b"]


def test_an_essay_goes_on_from_its_first_sentence_after_its_last():
    essay = Essay("e", "One two. Three four five! Six? Seven eight. " + "word " * 50 + "Nine (ten).) Eleven.")
    part = essay.part("train", random.Random(0))
    assert part.pieces(10_000)[:3] in (
        ["One two.", "Three four five!", "Six?"],
        ["Three four five!", "Six?", "One two."],
        ["Six?", "One two.", "Three four five!"],
    )
    assert sum(len(piece.split()) for piece in part.pieces(123)) == 123
    last = essay.part("validation", random.Random(0)).pieces(62)
    assert max(len(piece.split()) for piece in last) == 40  # a text without sentences has places for needles, too
    assert "Eleven." in " ".join(last)


def test_a_sentence_of_both_halves_is_for_training():
    essay = Essay("e", "A b. C d. A b. E f.")
    assert essay.part("validation", random.Random(0)).pieces(3) == ["E f.", "E"]


def test_essays_that_cannot_be_used(tmp_path):
    with pytest.raises(EvaluationError, match="the essay e is too short"):
        Essay("e", "Only one sentence. Only one sentence.")
    (tmp_path / "metadata.json").write_text("{}")
    with pytest.raises(EvaluationError, match="is a prepared corpus, which holds ids: name the text"):
        Essay.read(str(tmp_path))
    with pytest.raises(PathError):
        Essay.read("")


def test_an_essay_is_read_from_files(tmp_path):
    (tmp_path / "a.txt").write_text("One  two.\nThree.")
    (tmp_path / "b.txt").write_text("Four. Five\n six.")
    parts = [Essay.read(str(tmp_path)).part(split, random.Random(0)).pieces(3) for split in ("train", "validation")]
    assert sorted(parts[0]) == ["One two.", "Three."]
    assert "Four." in parts[1]
    assert Essay.read(str(ROOT / "README.md")).name.endswith("README.md")


def test_an_essay_is_named_by_its_absolute_path(tmp_path, monkeypatch):
    """Results, which the flags of eval.py and of the command end in, name it so."""
    (tmp_path / "a.txt").write_text("One two. Three.")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Essay.read("a.txt").name == Essay.read("~/a.txt").name == str(tmp_path / "a.txt")
    assert Essay.read("text:a.txt").name == f"text:{tmp_path / 'a.txt'}"
