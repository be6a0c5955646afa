"""Examples of RULER's tasks: what a prompt says, where it says it, and how long it is."""

import itertools
import re

import pytest

from rat_jax.evaluation import EvaluationError
from rat_jax.evaluation.ruler.examples import TASKS, make_example, prompt_ids
from rat_jax.evaluation.ruler.words import Words
from tests.evaluation.ruler.conftest import ESSAY
from tests.evaluation.ruler.reader import place_of, read_answers

NIAH = [task for task in TASKS if task.startswith("niah")]
NUM_ANSWERS = dict.fromkeys(TASKS, 1) | {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_what_the_prompt_says(tokenizers, settings, task):
    seen = set()
    for index in range(12):
        example = make_example(task, index, tokenizers["bytes"], settings(split="train" if index % 2 else "validation"))
        assert len(example.answers) == NUM_ANSWERS[task]
        assert read_answers(example.prompt) == set(example.answers)
        assert example.answer == " " + ", ".join(example.answers)
        assert not example.prompt.endswith(" ")
        seen.add(example.answers)
    assert len(seen) == 12


@pytest.mark.parametrize("task", NIAH)
def test_needles_stand_at_the_depths_that_are_recorded(tokenizers, settings, task):
    for index in range(5):
        example = make_example(task, index, tokenizers["bytes"], settings(context_length=4096, num_depths=5))
        assert len(example.depths) == len(example.answers)
        for answer, depth in zip(example.answers, example.depths, strict=True):
            assert place_of(example.prompt, answer) == pytest.approx(depth, abs=0.01)
        assert example.depths[0] == pytest.approx(index / 4, abs=0.02)  # half of a line
    assert example.as_json()["depth"] == pytest.approx(1.0)


def test_depths_that_are_not_asked_for_are_drawn(tokenizers, settings):
    depths = [make_example("niah_single_1", i, tokenizers["bytes"], settings()).depths[0] for i in range(40)]
    assert min(depths) < 0.2 and max(depths) > 0.8
    assert len(set(depths)) > 10


def test_variables_stand_in_the_order_of_their_chain_at_the_depths_that_are_recorded(tokenizers, settings):
    for index in range(5):
        example = make_example("vt", index, tokenizers["bytes"], settings(context_length=4096))
        lines = example.prompt.split("\n")[1:-1]
        places = [
            next(i for i, line in enumerate(lines) if line.startswith(f"VAR {name} =")) for name in example.answers
        ]
        assert places == sorted(places)
        noise = [len(line) * (not line.startswith("VAR")) for line in lines]
        found = [sum(noise[:place]) / sum(noise) for place in places]
        assert found == pytest.approx(example.depths)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["bytes", "bpe", "sentencepiece"])
def test_prompts_fill_their_context(tokenizers, settings, name, task):
    """The harness's RULER fills about 3.5K of 4K."""
    tokenizer = tokenizers[name]
    for length, bos in ((1536, False), (4096, True)):
        example = make_example(task, 0, tokenizer, settings(context_length=length, bos=bos))
        ids = prompt_ids(example, tokenizer, bos=bos)
        assert len(ids) == example.prompt_tokens
        assert 0.98 * length <= len(ids) + example.answer_tokens <= length
        assert len(tokenizer.encode(example.answer)) < example.answer_tokens  # the end of the document fits, too


def test_a_bos_is_read_only_where_it_is_asked_for(tokenizers, settings):
    """A BOS after left padding has moved S-NIAH-3 by 25 points elsewhere."""
    tokenizer = tokenizers["bpe"]
    example = make_example("niah_single_3", 0, tokenizer, settings())
    without, with_bos = (prompt_ids(example, tokenizer, bos=bos) for bos in (False, True))
    assert without == tokenizer.encode(example.prompt)
    assert with_bos == [tokenizer.eos_id, *without]


@pytest.mark.parametrize("task", TASKS)
def test_an_example_follows_from_its_number(tokenizers, settings, task):
    tokenizer = tokenizers["bytes"]
    again = [make_example(task, index, tokenizer, settings()) for index in (3, 1, 3)]
    assert again[0] == again[2]
    others = [settings(seed=1), settings(split="train"), settings(context_length=2000)]
    assert len({e.answers for e in again} | {make_example(task, 3, tokenizer, s).answers for s in others}) == 5


def test_what_an_example_is_does_not_change(tokenizers, settings):
    """Data that were generated once are generated again by later versions."""
    example = make_example("niah_multikey_2", 0, tokenizers["bytes"], settings(context_length=1024))
    assert example.answers == ("9042556",)


class FewWords(Words):
    """900 keys, of which two sets of several hundred would have some in common by chance."""

    source = "few"
    listed = ()

    def pair(self, rng):
        return f"{rng.choice('abcdefghijklmnopqrstuvwxyz1234')}-{rng.choice('abcdefghijklmnopqrstuvwxyz1234')}"


def test_splits_share_no_key(tokenizers, settings):
    keys = {}
    for split in ("train", "validation"):
        made = settings(split=split, words=FewWords(), context_length=1024)
        prompts = [make_example("niah_multikey_2", index, tokenizers["bytes"], made).prompt for index in range(30)]
        keys[split] = {key for prompt in prompts for key in re.findall(r"number of (\S-\S) is", prompt)}
    assert min(len(found) for found in keys.values()) > 200
    assert keys["train"] & keys["validation"] == set()


def test_splits_share_no_sentence_of_the_essay(tokenizers, settings):
    numbers = {}
    for split in ("train", "validation"):
        made = [make_example("niah_single_2", i, tokenizers["bytes"], settings(split=split)) for i in range(40)]
        numbers[split] = {n for example in made for n in re.findall(r"Sentence (\d+) is", example.prompt)}
    assert min(len(found) for found in numbers.values()) > 200
    assert numbers["train"] & numbers["validation"] == set()


def test_essays_are_text_as_it_stands(tokenizers, settings):
    prompt = make_example("niah_single_2", 0, tokenizers["bytes"], settings()).prompt
    first, second = re.findall(r"Sentence (\d+) is", prompt)[:2]
    assert int(second) == int(first) + 1
    start = ESSAY.index(f"Sentence {first} is")
    assert prompt.split("\n")[1].startswith(ESSAY[start : start + 20])


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("niah_single_9", {}, "there is no RULER task 'niah_single_9'; those that can be made are niah_single_1,"),
        ("niah_single_2", {"essay": None}, "niah_single_2 hides its needles in an essay"),
        ("niah_single_1", {"context_length": 300}, r"does not fit 300 tokens: .* choose a length of 3\d\d or more"),
        ("cwe", {"context_length": 900}, r"cwe does not fit 900 tokens"),
        ("niah_single_1", {"answer_tokens": 5}, "an answer has 9 tokens, answer_tokens is 5: raise it"),
    ],
)
def test_what_cannot_be_made(tokenizers, settings, task, changes, message):
    with pytest.raises(EvaluationError, match=message):
        make_example(task, 0, tokenizers["bytes"], settings(**changes))


@pytest.mark.parametrize("name", ["context_length", "num_depths", "answer_tokens"])
def test_settings_below_one(settings, name):
    with pytest.raises(EvaluationError, match=f"{name} must be 1 or more, got 0"):
        settings(**{name: 0})


def test_common_words_are_repeated_as_often_as_the_context_allows(tokenizers, settings):
    counts = {}
    for length, room in ((4095, 120), (4096, 120), (4096, 1000)):
        made = settings(context_length=length, answer_tokens=room)
        example = make_example("cwe", 0, tokenizers["bytes"], made)
        words = re.findall(r"\d+\. (\S+)", example.prompt)
        others = {words.count(word) for word in set(words) - set(example.answers)}
        counts[length, room] = {words.count(word) for word in example.answers}, others
    assert counts == {
        (4095, 120): ({6}, {1}),
        (4096, 120): ({30}, {3}),
        (4096, 1000): ({6}, {1}),  # 300 words of bytes and their numbers are more than is free
    }


def test_depths_of_several_needles_differ(tokenizers, settings):
    made = [make_example("niah_multiquery", i, tokenizers["bytes"], settings(context_length=4096)) for i in range(5)]
    assert all(len(set(example.depths)) > 1 for example in made)
    first, second = itertools.islice(made, 2)
    assert first.depths != second.depths
