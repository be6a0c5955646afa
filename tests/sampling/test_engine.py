"""The engine: every row as a plain loop continues it, whatever else goes on."""

import itertools
import math
import re
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rat_jax.memory import tree_bytes
from rat_jax.sampling import Engine, Event, Request, SamplingError, SamplingParams, reader, slots
from rat_jax.sampling.submitted import Submitted
from tests.small import PATTERNS, small_model

VOCAB = 31
CAPACITY = 48
GREEDY = SamplingParams.of()
SAMPLED = SamplingParams.of(temperature=1.5, top_k=20, repetition_penalty=1.2)
NEW = slots.STEPS_PER_CALL + 4
# Chunks of the models' RAT have 4 tokens, windows 5 and (RAttention) 2: 1, L - 1, L, L + 1, W - 1, W, W + 1, 3 W.
LENGTHS = [15, 1, 2, 3, 4, 5, 6, 12]


def make_prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, VOCAB, length).tolist()


def plain_loop(decoder, prompt: list[int], count: int, banned: tuple[int, int] = (0, 0)) -> list[tuple[int, float]]:
    """`count` greedy tokens and their log-probabilities, one at a time; `banned`: an id, and for how many tokens."""
    cache, chosen = decoder.init_cache(1, CAPACITY), []
    for token in prompt:
        logits, cache = decoder.extend(jnp.array([[token]]), cache)
    for step in range(count):
        row = np.asarray(logits[0, 0], np.float64)
        possible = row.copy()
        if step < banned[1]:
            possible[banned[0]] = -np.inf
        token = int(possible.argmax())
        chosen.append((token, row[token] - np.log(np.exp(row - row.max()).sum()) - row.max()))
        logits, cache = decoder.extend(jnp.array([[token]]), cache)
    return chosen


class Heard:
    """What an engine told, by request and sample."""

    def __init__(self):
        self.tokens: dict[tuple[int, int], list[int]] = defaultdict(list)
        self.log_probs: dict[tuple[int, int], list[float]] = defaultdict(list)
        self.ends: dict[tuple[int, int], str] = {}
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        row = event.request, event.sample
        assert row not in self.ends
        assert event.tokens or event.end
        self.events.append(event)
        self.tokens[row] += event.tokens
        self.log_probs[row] += event.log_probs or []
        if event.end is not None:
            self.ends[row] = event.end


# Tests below continue ragged prompts by the hybrid.
@pytest.mark.parametrize(
    "pattern",
    [pytest.param(pattern, marks=[pytest.mark.slow] * (len(pattern) > 1)) for pattern in PATTERNS],
    ids="+".join,
)
def test_ragged_prompts_are_continued_as_by_a_plain_loop(pattern):
    """Two slots, prompts that are read in parts beside rows that run, some that come late."""
    decoder, heard = small_model(pattern, num_layers=len(pattern)).decoder(), Heard()
    engine = Engine(decoder, num_slots=2, capacity=CAPACITY, rule=GREEDY, eos_id=None, chunk_sizes=(8,))
    requests = [Request(make_prompt(length), NEW - index, on_event=heard) for index, length in enumerate(LENGTHS)]
    for request in requests[:3]:
        engine.submit(request)
    for _ in range(3):
        engine.step()
    for request in requests[3:]:
        engine.submit(request)
    engine.run()
    for number, request in enumerate(requests):
        want = [token for token, _ in plain_loop(decoder, list(request.prompt), request.max_new_tokens)]
        assert heard.tokens[number, 0] == want
        assert heard.ends[number, 0] == "length"


@pytest.fixture(scope="module")
def decoder():
    return small_model(("rat", "local_attention")).decoder()


def make_engine(decoder, rule=GREEDY, **settings) -> Engine:
    """An engine whose programs all tests of this module share: 16 slots, two prompts read together."""
    settings = {"eos_id": None, "chunk_sizes": (8, 16), "seed": 3} | settings
    return Engine(decoder, num_slots=16, capacity=CAPACITY, rule=rule, **settings)


@pytest.fixture
def log_compiles():
    jax.config.update("jax_log_compiles", True)  # in all threads
    yield
    jax.config.update("jax_log_compiles", False)


RAGGED = [(1 + 7 * index % 29, 1 + 5 * index % 19) for index in range(40)]  # lengths, new tokens


@pytest.fixture(scope="module")
def ragged(decoder) -> Heard:
    """Ragged requests through 16 slots, each also told how likely its tokens were."""
    heard, engine = Heard(), make_engine(decoder)
    requests = [Request(make_prompt(length), count, log_probs=True, on_event=heard) for length, count in RAGGED]
    assert list(engine.serve(requests)) == heard.events
    assert (engine.is_busy, engine.num_running) == (False, 0)
    return heard


def test_more_prompts_than_slots(decoder, ragged):
    for number, (length, count) in enumerate(RAGGED):
        tokens, log_probs = zip(*plain_loop(decoder, make_prompt(length), count), strict=True)
        assert ragged.tokens[number, 0] == list(tokens)
        np.testing.assert_allclose(ragged.log_probs[number, 0], log_probs, atol=1e-4)
    assert ragged.ends == dict.fromkeys(itertools.product(range(len(RAGGED)), [0]), "length")


def test_requests_may_be_held_back(decoder):
    """None: there are none now, while others run or not."""
    requests = [None, Request(make_prompt(3), 4), None, None, Request(make_prompt(5), 4)]
    ends = [event.request for event in make_engine(decoder).serve(iter(requests)) if event.end == "length"]
    assert ends == [0, 1]


def test_all_programs_are_compiled_up_front(caplog, log_compiles):
    """Ragged traffic compiles nothing more, and no more was compiled than the engine says."""

    def compiled() -> list[str]:
        names = re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)
        caplog.clear()
        return names

    decoder = small_model(("rnn",), num_layers=3).decoder()  # no other test's, whose programs would be there
    jax.random.key(0, impl="threefry2x32")  # a program of jax's own
    caplog.clear()
    engine = make_engine(decoder)
    engine.compile([3, 8, 5])  # two of them together, in a chunk of 8
    few = ["decode_block", "empty_prompts", "empty_slots", "first_tokens", "insert", "read_chunk"]
    assert sorted(compiled()) == few
    engine.compile()
    assert sorted(compiled()) == ["empty_prompts", "insert", *3 * ["read_chunk"]]
    assert engine.num_programs == 3 + 2 * (2 + 2)
    prompts = [Request(make_prompt(length), count, num_samples=1 + length % 3) for length, count in RAGGED]
    for _ in engine.serve(prompts):
        pass
    assert compiled() == []
    num_tokens, num_padded = engine.num_prompt_tokens
    assert num_tokens == sum(length for length, _ in RAGGED) < num_padded


def run_eight(decoder, rule: SamplingParams, disturb) -> Heard:
    """Eight rows that start together; `disturb` is called with the engine when they have begun."""
    heard, engine = Heard(), make_engine(decoder, rule)
    for length in LENGTHS:
        engine.submit(Request(make_prompt(length), NEW, log_probs=True, on_event=heard))
    engine.step()
    engine.step()
    disturb(engine)
    engine.run()
    return heard


def test_rows_that_are_cancelled_or_fail_leave_the_others(decoder):
    def disturb(engine: Engine) -> None:
        assert engine.cancel(2)
        assert not engine.cancel(2)
        failing = engine._submitted[5].rows[0].slot
        poisoned = jax.tree.map(
            lambda x: x.at[failing].set(jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x, engine._device.slots
        )
        engine._device.slots = poisoned

    calm, disturbed = (run_eight(decoder, SAMPLED, change) for change in (lambda engine: None, disturb))
    assert set(calm.ends.values()) == {"length"}
    for number in range(len(LENGTHS)):
        row = number, 0
        if number in (2, 5):
            assert disturbed.ends[row] == {2: "cancelled", 5: "not_finite"}[number]
            assert len(disturbed.tokens[row]) < NEW
            assert disturbed.tokens[row] == calm.tokens[row][: len(disturbed.tokens[row])]
        else:
            assert disturbed.ends[row] == "length"
            assert disturbed.tokens[row] == calm.tokens[row]
            assert disturbed.log_probs[row] == calm.log_probs[row]  # to the bit


def test_steps_of_a_fixed_number_give_the_same(monkeypatch):
    """As they are traced for GPUs."""
    decoder = small_model(("rnn",), num_layers=1).decoder()

    def run(num_slots: int) -> Heard:
        heard = Heard()
        engine = Engine(decoder, num_slots=num_slots, capacity=CAPACITY, rule=GREEDY, eos_id=7, chunk_sizes=(16,))
        for length in LENGTHS:
            engine.submit(Request(make_prompt(length), NEW + length, on_event=heard))
        engine.run()
        return heard

    as_on_cpu = run(2)
    monkeypatch.setattr(slots, "expected_platform", lambda: "gpu")
    fixed = run(3)  # another number of slots: traced anew
    assert (fixed.tokens, fixed.ends) == (as_on_cpu.tokens, as_on_cpu.ends)
    assert len(set(map(len, fixed.tokens.values()))) > 1


def test_what_waits_or_is_read_can_be_cancelled(decoder):
    heard, engine = Heard(), make_engine(decoder, prefill_tokens=1)
    for _ in range(20):
        engine.submit(Request(make_prompt(30), 6, num_samples=2, on_event=heard))
    engine.step()  # reads a part of some
    for number in range(19):
        assert engine.cancel(number)
    engine.run()
    assert heard.ends == {
        (number, sample): "cancelled" if number < 19 else "length" for number in range(20) for sample in range(2)
    }
    want = [token for token, _ in plain_loop(decoder, make_prompt(30), 6)]
    assert heard.tokens[19, 0] == heard.tokens[19, 1] == want


def test_a_callback_ends_its_row_alone(decoder, ragged):
    told = []

    def enough(event: Event) -> bool:
        told.append(event)
        return event.end is None and sum(len(one.tokens) for one in told) >= 3

    engine, others = make_engine(decoder), Heard()
    length, count = RAGGED[3]
    engine.submit(Request(make_prompt(length), CAPACITY - length, on_event=enough))
    engine.submit(Request(make_prompt(length), count, on_event=others))
    engine.run()
    assert told[-1] == Event(0, 0, [], None, "stopped")
    assert 3 <= sum(len(one.tokens) for one in told) < CAPACITY - length
    assert others.tokens[1, 0] == ragged.tokens[3, 0]


def test_samples_of_a_prompt_are_those_of_equal_prompts(decoder):
    prompts = [make_prompt(9), make_prompt(4)]
    apart, together = Heard(), Heard()
    engine = make_engine(decoder, SAMPLED)
    for prompt in (prompts[0], prompts[1], prompts[0], prompts[0]):
        engine.submit(Request(prompt, 12, on_event=apart))
    engine.run()
    engine = make_engine(decoder, SAMPLED)
    engine.submit(Request(prompts[0], 12, num_samples=2, on_event=together))
    engine.submit(Request(prompts[1], 12, on_event=together))
    engine.submit(Request(prompts[0], 12, on_event=together))
    engine.run()
    assert [together.tokens[row] for row in ((0, 0), (1, 0), (0, 1), (2, 0))] == [apart.tokens[i, 0] for i in range(4)]
    assert len({tuple(apart.tokens[number, 0]) for number in (0, 2, 3)}) == 3
    assert engine.num_prompt_tokens[0] == 9 + 4 + 9  # the two samples' prompt once
    # More samples than slots, and the copies that `generate` counts.
    many, engine = Heard(), make_engine(decoder, SAMPLED)
    engine.submit(Request(prompts[0], 12, num_samples=20, on_event=many))
    engine.run()
    assert many.tokens[0, 1] == apart.tokens[2, 0]
    assert len({tuple(row) for row in many.tokens.values()}) == 20


def test_the_end_of_a_document_waits_for_min_new_tokens(decoder):
    prompt = make_prompt(9)
    eos_id = plain_loop(decoder, prompt, 1)[0][0]
    heard, engine = Heard(), make_engine(decoder, eos_id=eos_id)
    for least in (0, 5):
        engine.submit(Request(prompt, NEW, min_new_tokens=least, on_event=heard))
    engine.run()
    assert (heard.tokens[0, 0], heard.ends[0, 0]) == ([], "eos")
    want = [token for token, _ in plain_loop(decoder, prompt, NEW, banned=(eos_id, 5))]
    after = [*want[5:], eos_id].index(eos_id)
    assert heard.tokens[1, 0] == want[: 5 + after]


def test_running_rows_do_not_wait_for_a_long_prompt(decoder):
    engine, heard = make_engine(decoder, prefill_tokens=4), Heard()
    engine.submit(Request(make_prompt(3), 40, on_event=heard))
    engine.step()
    engine.submit(Request(make_prompt(30), 3, on_event=heard))
    engine.run()
    before = list(itertools.takewhile(lambda event: event.request == 0, heard.events))
    assert [len(event.tokens) for event in before] == [1, 8, 8]  # the prompt was read in two parts
    assert heard.tokens[1, 0] == [token for token, _ in plain_loop(decoder, make_prompt(30), 3)]


def test_requests_are_taken_as_there_is_room(decoder, monkeypatch):
    monkeypatch.setattr("rat_jax.sampling.engine.LOOK_AHEAD", 4)
    taken = itertools.count()

    def requests():
        for length, count in 2 * RAGGED:
            next(taken)
            yield Request(make_prompt(length), count)

    num_ended = 0
    for event in make_engine(decoder).serve(requests()):
        num_ended += event.end is not None
        num_taken = int(re.search(r"\d+", repr(taken))[0])
        assert num_taken - num_ended <= 4 + 2 + 2 * 16  # that wait, are read, run, or have ended and are not told yet
    assert num_ended == 2 * len(RAGGED)


def test_prompts_of_like_length_are_read_together():
    lengths = [50, 9, 8, 900, 51, 10, 7]
    waiting = [Submitted(i, None, np.zeros(length), 0, 0) for i, length in enumerate(lengths)]
    assert [len(one.prompt) for one in reader.like_prompts(waiting, 3)] == [50, 51, 10]
    assert [len(one.prompt) for one in reader.like_prompts(waiting[1:], 3)] == [9, 8, 10]


def test_caches_are_written_in_place_and_of_the_stated_size(decoder):
    """Neither steps nor inserts copy parameters, keys or values, and a step reads them as they are."""
    engine = make_engine(decoder)
    device = engine._device
    block = device.lower_block().compile()
    held = tree_bytes(device.slots.cache)
    assert block.memory_analysis().alias_size_in_bytes >= held
    device.begin_prompts(2)
    put = device.lower_insert(device.prompts, slots.Entries.none(2, 16)).compile()
    assert put.memory_analysis().alias_size_in_bytes >= held
    assert put.memory_analysis().temp_size_in_bytes < held / 2
    assert engine.cache_bytes == held + tree_bytes(device.prompts.cache)
    computations = [text for text in block.as_text().split("\n\n") if not text.lstrip().startswith("%fused")]
    copied = re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", "".join(computations))  # others lay out a product's operand
    sizes = [math.prod(map(int, filter(None, shape.split(",")))) for shape in copied]
    cached = [x.size for x in jax.tree.leaves(device.slots.cache) if x.ndim == 4]
    assert sizes and max(sizes) < min(cached)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "the prompt has no tokens"),
        ({"prompt": [1, 31]}, "the prompt, position 1: token id 31 is outside the vocabulary of 31"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"num_samples": 0}, "num_samples must be 1 or more, got 0"),
        ({"min_new_tokens": 3}, "min_new_tokens 3 is above max_new_tokens 2"),
        (
            {"prompt": [1] * 40, "max_new_tokens": 10},
            r"a prompt of 40 tokens with max_new_tokens 10 needs a capacity of 49 tokens a row, and the engine's is 48 "
            r"\([\d,]+ bytes a row\)",
        ),
    ],
)
def test_what_no_slot_can_continue_is_refused(decoder, changes, message):
    engine = make_engine(decoder)
    with pytest.raises(SamplingError, match=message):
        engine.submit(Request(**{"prompt": [1, 2], "max_new_tokens": 2} | changes))
    assert not engine.is_busy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_slots": 0}, "num_slots must be 1 or more, got 0"),
        ({"capacity": 2**31}, r"capacity must be below 2\*\*31"),
        ({"chunk_sizes": (16, 8)}, r"chunk_sizes must be numbers of 1 or more, ascending, got \(16, 8\)"),
        ({"prefill_tokens": 0}, "prefill_tokens must be 1 or more, got 0"),
        ({"num_slots": 10**9}, r"the caches of 1000000000 prompts at a time, of 48 tokens .* take .* GiB"),
    ],
)
def test_what_no_engine_can_have_is_refused(decoder, changes, message):
    settings = {"num_slots": 2, "capacity": CAPACITY, "rule": GREEDY, "eos_id": None} | changes
    with pytest.raises(SamplingError, match=message):
        Engine(decoder, **settings)
