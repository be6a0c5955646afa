"""Many prompts: read as they are needed, texts as `generate` makes them."""

import dataclasses

import pytest

from rat_jax.data.tokenizer import ByteTokenizer
from rat_jax.sampling import Event, SamplingError, SamplingStopped, engine, generate
from rat_jax.sampling.batch import Batch
from rat_jax.sampling.prompts import Prompt, PromptError
from rat_jax.sampling.request import Request
from rat_jax.sampling.text_settings import TextSettings
from tests.small import small_model

BYTES = ByteTokenizer()
SETTINGS = TextSettings(
    max_new_tokens=9,
    temperature=1.5,
    top_k=None,
    top_p=None,
    repetition_penalty=1.0,
    seed=3,
    min_new_tokens=0,
    num_samples=1,
    stop=(),
    log_probs=False,
)
BAD = PromptError("line 3: is not JSON")
PROMPTS = [Prompt.of("one", "line 1"), Prompt.of("a longer one", "line 2"), BAD, Prompt.of("one", "line 4")]


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self, done: tuple[int, ...] = ()):
        self.done, self.has_room = done, True
        self.skipped: list[int] = []
        self.completions = {}

    def is_done(self, row: int) -> bool:
        return row in self.done

    def skip(self, row: int) -> None:
        self.skipped.append(row)

    def grow(self, completion) -> None:
        assert completion.row not in self.completions

    def finish(self, completion) -> None:
        self.completions[completion.row] = completion


@pytest.fixture(scope="module")
def model():
    return small_model(("rnn",), vocab_size=257, num_layers=1)


def make_batch(model, prompts, max_prompt_tokens=None, batch_size=2, **changes) -> Batch:
    settings = dataclasses.replace(SETTINGS, **changes)
    sizes = {"batch_size": batch_size, "max_prompt_tokens": max_prompt_tokens}
    return Batch(model, BYTES, prompts, settings, **sizes)


def run(batch: Batch, sink: Kept) -> Kept:
    refused = []
    survey = batch.survey(sink, refused.append, lambda: None)
    assert not refused
    counts = []
    batch.run(batch.engine(survey), sink, counts.append)
    assert sum(counts) >= sum(len(completion.tokens) for completion in sink.completions.values())
    return sink


@pytest.fixture(scope="module")
def expected(model):
    """Two samples of each prompt, in the order of rows; of the equal ones four in all."""
    ids = [BYTES.encode(prompt.text) for prompt in PROMPTS if prompt is not BAD for _ in range(2)]
    texts = generate(model, ids, max_new_tokens=9, temperature=1.5, seed=3, eos_id=BYTES.eos_id)
    return dict(zip((0, 1, 2, 3, 6, 7), texts, strict=True))


def test_samples_are_those_of_equal_prompts(model, expected):
    sink = run(make_batch(model, PROMPTS, num_samples=2, log_probs=True), Kept())
    assert {row: completion.tokens for row, completion in sink.completions.items()} == expected
    assert all(len(c.log_probs) == len(c.tokens) and max(c.log_probs) <= 0 for c in sink.completions.values())
    assert sink.completions[7].sample == 1


def test_what_is_done_is_not_made_again_and_changes_no_other(model, expected):
    sink = run(make_batch(model, PROMPTS, num_samples=2), Kept(done=(0, 2, 3, 7)))
    assert {row: completion.tokens for row, completion in sink.completions.items()} == {
        row: expected[row] for row in (1, 6)
    }


def test_a_stop_string_ends_a_text(model, expected):
    whole = BYTES.decode(expected[0])
    stop = whole[3:5]
    sink = run(make_batch(model, PROMPTS[:1], stop=(stop,)), Kept())
    assert sink.completions[0].text == whole[: whole.index(stop)]


def test_prompts_are_read_no_further_ahead_than_the_engine_needs(model, monkeypatch):
    monkeypatch.setattr(engine, "LOOK_AHEAD", 4)
    num_read, ahead = 0, []

    class Watching(Kept):
        def finish(self, completion) -> None:
            super().finish(completion)
            ahead.append(num_read - len(self.completions))

    class Source:
        def __iter__(self):
            nonlocal num_read
            num_read = 0
            for number in range(40):
                num_read += 1
                yield Prompt.of("one", f"line {number}")

    sink = run(make_batch(model, Source(), max_new_tokens=1), Watching())
    assert len(sink.completions) == 40
    assert max(ahead) <= 4 + 2 + 2 + 2  # waiting, being read, in slots, told of in the same step


def test_nothing_is_begun_while_the_sink_has_no_room(model):
    sink = Kept()
    requests = make_batch(model, PROMPTS)._requests(sink)
    assert isinstance(next(requests), Request)
    sink.has_room = False
    assert (next(requests), next(requests)) == (None, None)
    sink.has_room = True
    assert [len(request.prompt) for request in requests] == [12, 3]


def test_logits_that_are_not_finite_end_the_batch_and_name_the_prompt(model):
    request = next(make_batch(model, PROMPTS)._requests(Kept()))
    request.on_event(Event(0, 0, [65, 66], None, None))
    with pytest.raises(SamplingStopped, match="line 1: the logits of new token 3 are not finite"):
        request.on_event(Event(0, 0, [67], None, "not_finite"))


def test_long_prompts_are_refused_with_the_limit_and_what_they_would_take(model):
    refused, sink = [], Kept()
    survey = make_batch(model, PROMPTS, max_prompt_tokens=5, num_samples=2).survey(sink, refused.append, lambda: None)
    assert (survey.num_prompts, survey.num_rows, survey.num_refused, survey.lengths) == (2, 4, 1, {3})
    assert sink.skipped == [2, 3]
    assert str(refused[0]).startswith("line 2: has 12 tokens, more than max_prompt_tokens 5: shorten it, or raise that")
    assert "would take" in str(refused[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"min_new_tokens": 10}, "min_new_tokens 10 is above max_new_tokens 9"),
        ({"num_samples": 0}, "num_samples must be 1 or more, got 0"),
        ({"num_samples": 2, "temperature": 0.0}, "num_samples 2 has no effect at temperature 0"),
        ({"top_k": 2, "temperature": 0.0}, "top_k 2 has no effect at temperature 0"),
        ({"stop": ("a", "")}, "a stop string is empty"),
        ({"seed": -1}, "seed must lie between 0 and"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_or_do_nothing(changes, message):
    with pytest.raises(SamplingError, match=message):
        dataclasses.replace(SETTINGS, **changes)


def test_settings_in_the_output_are_as_before_where_nothing_new_is_asked_for():
    assert list(SETTINGS.to_record()) == [
        *("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
    ]
    changed = dataclasses.replace(SETTINGS, min_new_tokens=2, num_samples=2, stop=("\n",), log_probs=True)
    news = {"min_new_tokens": 2, "num_samples": 2, "stop": ["\n"], "log_probs": True}
    assert changed.to_record() == SETTINGS.to_record() | news
