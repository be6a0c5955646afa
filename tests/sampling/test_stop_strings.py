"""Stop strings: over the borders of tokens, whatever comes at a time, and no token more than needed."""

import random

import pytest

from rat_jax.data.tokenizer import ByteTokenizer, train_bpe
from rat_jax.sampling import SamplingError, generate, generate_text
from rat_jax.sampling.device_rows import DeviceRows
from rat_jax.sampling.slots import STEPS_PER_CALL
from rat_jax.sampling.stop_strings import StoppedText
from tests.small import small_model

BYTES = ByteTokenizer()
PROMPTS = [[65, 66], [67], [68, 69, 70, 71, 72], [67]]
NEW = 3 * STEPS_PER_CALL + 4


def stopped(text: str, stop: list[str], sizes=(1,), tokenizer=BYTES) -> str:
    ids, result = tokenizer.encode(text), StoppedText(tokenizer, [], stop)
    while ids:
        size = random.choice(sizes)
        result.push(ids[:size])
        ids = ids[size:]
    result.push([])
    return result.text


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("one two", [], "one two"),
        ("one two", ["\n"], "one two"),
        ("one\ntwo\nthree", ["\n"], "one"),
        ("one\n\ntwo", ["\n\n", "Q:"], "one"),
        ("\n\none", ["\n\n"], ""),
        ("a b c d", ["b c d", "c"], "a b "),  # "c" is complete first
        ("a b c d", ["c", "b c"], "a "),  # both are complete together
        ("aab", ["ab"], "a"),
        ("größer als 5 €.", ["€"], "größer als 5 "),
        ("日本語。終", ["。"], "日本語"),
        ("a\ufffdb", ["\ufffd"], "a"),
    ],
)
def test_a_text_ends_at_the_string_that_is_complete_first(text, stop, want):
    random.seed(0)
    for sizes in ((1,), (2,), (1, 2, 3, 5), (100,)):
        assert stopped(text, stop, sizes) == want


def test_strings_that_begin_and_end_inside_tokens():
    text = "the answer is forty-two, and the question is not. " * 8
    bpe = train_bpe([text], 285)
    assert len(bpe.encode(text)) < len(text) / 3
    random.seed(1)
    for _ in range(100):
        start = random.randrange(len(text) - 12)
        stop = text[start : start + random.randrange(1, 12)]
        assert stopped(text, [stop], (1, 2, 16), bpe) == text[: text.index(stop)]


def test_a_prompt_is_not_searched():
    result = StoppedText(BYTES, BYTES.encode("Q: one\n"), ["\nA"])
    result.push(BYTES.encode("A: two"))
    assert (result.text, result.is_stopped) == ("A: two", False)


def test_an_empty_string_is_refused():
    with pytest.raises(SamplingError, match="a stop string is empty"):
        StoppedText(BYTES, [1], ["\n", ""])


@pytest.fixture(scope="module")
def model():
    return small_model(("rnn",), vocab_size=257, num_layers=1)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "seed": 3}], ids=["greedy", "sampled"])
def test_texts_are_those_of_generate_up_to_the_string(model, settings):
    ids = generate(model, PROMPTS, max_new_tokens=NEW, eos_id=BYTES.eos_id, **settings)
    whole = [BYTES.decode(x) for x in ids]
    stop = [whole[0][20:22], whole[1][5:8]]
    finished = {}
    texts = generate_text(
        model,
        BYTES,
        PROMPTS,
        stop=stop,
        max_new_tokens=NEW,
        batch_size=len(PROMPTS),
        on_text=finished.__setitem__,
        **settings,
    )
    assert texts == [stopped(text, stop, (100,)) for text in whole]
    assert finished == dict(enumerate(texts))
    assert len(texts[0]) < len(whole[0])
    assert (whole[1] == whole[3]) == (not settings)  # equal prompts are samples of their own


def test_a_batch_ends_with_its_last_text(model, monkeypatch):
    seen, calls = [], []
    real = DeviceRows.step

    def count(*arguments):
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(DeviceRows, "step", count)

    def enough_after_one_call(index, ids):
        seen.append((index, len(ids)))
        return len(ids) > 1

    ids = generate(model, PROMPTS[:2], max_new_tokens=NEW, on_tokens=enough_after_one_call)
    assert [len(x) for x in ids] == [1 + STEPS_PER_CALL] * 2
    assert len(calls) == 2  # the second was under way; all tokens would take four
    assert seen == [(0, 1), (1, 1), (0, STEPS_PER_CALL), (0, 0), (1, STEPS_PER_CALL), (1, 0)]
