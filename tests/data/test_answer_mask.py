"""Which ids of an example are learned, and what is cut where it is too long."""

import pytest

from rat_jax.data import DataError
from rat_jax.data.answer_mask import cut_middle, masked_ids, prompt_ids
from rat_jax.data.chat_template import END
from rat_jax.data.example import Example, Turn
from rat_jax.data.tokenizer import ByteTokenizer, IdTokenizer

BYTES = ByteTokenizer()


def shown(masked) -> tuple[str, str]:
    """Ids as text with $ for the end, and a line under those that are learned."""
    text = "".join("$" if i == BYTES.eos_id else chr(i) for i in masked.ids)
    return text, "".join("-" if is_answer else " " for is_answer in masked.is_answer)


def masked(example, seq_len):
    return [
        (None if found is None else shown(found), was_cut) for found, was_cut in masked_ids(example, BYTES, seq_len)
    ]


def test_answers_and_their_ends_are_learned():
    example = Example((Turn(f"ab{END}c", "de"),), f"{END}fg", ("hi", "j"))
    before = "ab$cde$$fg", "    ---   "
    assert masked(example, 100) == [
        ((before[0] + "hi$", before[1] + "---"), False),
        ((before[0] + "j$", before[1] + "--"), False),
    ]
    ids, numbers = prompt_ids(example, BYTES)
    assert numbers == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0] and len(ids) == len(numbers)


@pytest.mark.parametrize(
    ("seq_len", "text", "mask", "was_cut"),
    [
        (13, "0123456789xy$", "          ---", False),
        (12, "0123456789xy$".replace("5", "", 1), "         ---", True),
        (7, "0189xy$", "    ---", True),
        (6, "019xy$", "   ---", True),
        (4, "0xy$", " ---", True),
    ],
)
def test_too_long_a_prompt_loses_its_middle(seq_len, text, mask, was_cut):
    assert masked(Example((), "0123456789", ("xy",)), seq_len) == [((text, mask), was_cut)]


def test_too_long_an_answer_is_counted_and_the_others_stay():
    assert masked(Example((), "ab", ("xyz", "x")), 3) == [(None, False), (("ax$", " --"), True)]


def test_an_earlier_answer_that_was_cut_is_not_learned():
    example = Example((Turn("ab", "cd"), Turn("ef", "gh")), "i", ("j",))  # abcd$efgh$i and j$
    assert masked(example, 12) == [(("abcd$" + "fgh$i" + "j$", "  ---" + " --- " + "--"), True)]
    assert masked(example, 9) == [(("abcd" + "h$i" + "j$", "    " + "   " + "--"), True)]


def test_the_middle():
    values = list(range(10))
    for room in range(1, 12):
        kept = cut_middle(values, room)
        assert len(kept) == min(room, 10)
        if room < 10:
            assert kept == values[: -(-room // 2)] + values[10 - room // 2 :]


def test_a_prompt_without_ids():
    with pytest.raises(DataError, match="the tokenizer has no ids for the prompt ' '"):
        prompt_ids(Example((), " ", ("1",)), IdTokenizer(9, 0))
