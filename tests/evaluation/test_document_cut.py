"""Documents cut around their answers: every number is counted by hand in bytes."""

import pytest

from rat_jax.data.tokenizer import ByteTokenizer, train_bpe
from rat_jax.evaluation import EvaluationError
from rat_jax.evaluation.document_cut import DocumentCut
from rat_jax.evaluation.groups import GROUPS

BYTES = ByteTokenizer()
TEXT = "0123456789" * 10


@pytest.mark.parametrize(
    ("around", "row", "want"),
    [
        ((), {}, (0, 20)),
        (("value",), {"value": "0123456789012"}, (0, 20)),  # at the beginning: all of it after
        (("value",), {"value": "9" + TEXT[:60]}, (0, 20)),  # at 9: fewer than 10 before, 11 after
        (("value",), {"value": "X5X"}, (40, 60)),
        (("key", "value"), {"key": "Y8y", "value": "x5x"}, (40, 60)),  # the first of both, in any case
        (("answers",), {"answers": ["y8Y", "X5X"]}, (70, 90)),  # of several answers the first
        (("value",), {"value": "none"}, (89, 100)),  # not there: before the last character, and what is left
        (("value",), {"value": "none", "alt_answers": ["nor this", "x5x"]}, (40, 60)),
        (("value",), {"value": "none", "tok_pos": 30}, (20, 40)),
        (("value",), {"value": "X5X", "tok_pos": 30}, (40, 60)),
    ],
    ids=str,
)
def test_which_tokens_are_kept(around, row, want):
    document = f"  {TEXT[:50]}X5X{TEXT[53:80]}Y8Y{TEXT[83:]}\n"
    if row.get("value", "").startswith("9"):
        document = TEXT
    cut = DocumentCut("text", around, reserved_tokens=5).apply({"text": document, **row}, BYTES, 25)
    assert cut == {**row, "text": document.strip()[slice(*want)]}


def test_a_document_that_fits_is_whole_and_ends_at_its_mark():
    cut = DocumentCut("text", ("value",), 5, end_mark="Summary...")
    row = {"text": " the value. Summary... value:", "value": "value", "more": 1}
    assert cut.apply(row, BYTES, 100) == row | {"text": "the value. "[:-1]}
    assert row["text"].endswith("value:")  # the data set keeps its row


def test_tokens_are_those_of_the_models_tokenizer():
    bpe = train_bpe(["the cat sat on the mat and the cat sat on the hat"], 270)
    text = "the cat sat on the mat and the cat sat on the hat"
    cut = DocumentCut("text", (), 2).apply({"text": text}, bpe, 8)
    assert cut["text"] == bpe.decode(bpe.encode(text)[:6])
    assert len(cut["text"]) > 6


@pytest.mark.parametrize("row", [{"value": "a"}, {"value": ""}, {"value": []}, {"value": ["b", "long"]}], ids=str)
def test_answers_of_a_character_are_not_asked(row):
    assert DocumentCut("text", ("value",), 5).apply({"text": TEXT, **row}, BYTES, 25) is None


def test_a_context_without_room_for_a_document():
    with pytest.raises(EvaluationError, match="length of 50 has no room for a document beside the 50 tokens"):
        DocumentCut("text", (), 50).apply({"text": TEXT}, BYTES, 50)


def test_the_protocol_at_2k():
    """Just Read Twice: contexts of 2048 tokens, of 2000 in Natural Questions, of which 50 are for the answer."""
    recall = GROUPS["recall"]
    left = {task.name: recall.text["context_length"] - task.cut.reserved_tokens for task in recall.tasks}
    assert left == dict.fromkeys(left, 1998) | {"recall_nq": 1950}
