"""Continuations of one context: the numbers of pairs by themselves, less to compute, few shapes, bounded memory."""

import numpy as np
import pytest

from rat_jax.evaluation.scoring import Scorer
from rat_jax.evaluation.shared_contexts import SharedContext, context_scores, plan_contexts, with_beginnings
from tests.small import bigram_model, small_model

V = 31


def scorer_of(model, context_length: int = 64, batch_tokens: int = 256) -> Scorer:
    return Scorer(model, None, context_length=context_length, batch_tokens=batch_tokens)


def questions(rng, sizes: list[tuple[int, list[int]]]) -> list[tuple[list[int], list[int]]]:
    """Pairs of a context and each of its options, by their numbers of tokens."""
    pairs = []
    for length, options in sizes:
        context = rng.integers(0, V, length).tolist()
        pairs += [(context, rng.integers(0, V, option).tolist()) for option in options]
    return pairs


SIZES = [(20, [3, 9, 1, 2]), (17, [1, 1, 5, 2]), (18, [4, 4]), (22, [6, 7]), (19, [5]), (23, [2])]


@pytest.mark.parametrize(
    ("pattern", "changes"),
    [
        # RAT is below, with common beginnings.
        pytest.param(("rat", "local_attention"), {}, marks=pytest.mark.slow),
        (("rattention", "attention"), {"num_kv_heads": 2}),
    ],
    ids=str,
)
def test_they_are_scored_as_by_themselves(pattern, changes):
    model = small_model(pattern, **changes)
    pairs = questions(np.random.default_rng(0), SIZES)
    order = np.random.default_rng(1).permutation(len(pairs))
    pairs = [pairs[index] for index in order]  # options of a question need not be neighbours
    scorer, alone = scorer_of(model), scorer_of(model)
    together = scorer.score(pairs)
    apart = [score for pair in pairs for score in alone.score([pair])]
    assert alone.num_tokens == 14 * 32
    for index, score in enumerate(together):
        np.testing.assert_allclose(score.log_probs, apart[index].log_probs, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(score.greedy, apart[index].greedy)
        assert len(score.log_probs) == len(pairs[index][1])
    assert scorer.num_tokens < alone.num_tokens


def test_a_context_is_read_once():
    model, table = bigram_model()
    rng = np.random.default_rng(2)
    pairs = questions(rng, [(48, [8] * 4)] * 6)
    scorer = scorer_of(model)
    for (context, continuation), score in zip(pairs, scorer.score(pairs), strict=True):
        before = [context[-1], *continuation[:-1]]
        np.testing.assert_allclose(score.log_probs, table[before, continuation], atol=1e-5)
    assert scorer.num_tokens == 6 * (48 + 4 * 8)  # without sharing 6 * 4 * 56 and more
    single = scorer_of(model)
    single.score(questions(rng, [(48, [1, 1])] * 4))
    assert single.num_tokens == 4 * 48  # words of one token are not read


def test_what_contexts_begin_with_is_read_once():
    """Contexts that differ in their last token alone: what follows depends on it."""
    model, table = bigram_model()
    rng = np.random.default_rng(8)
    beginning = rng.integers(0, V, 75).tolist()
    pairs = [([*beginning, last], rng.integers(0, V, 8).tolist()) for last in range(12) for _ in range(2)]
    scorer = scorer_of(model, context_length=128, batch_tokens=4096)
    for (context, continuation), score in zip(pairs, scorer.score(pairs), strict=True):
        before = [context[-1], *continuation[:-1]]
        np.testing.assert_allclose(score.log_probs, table[before, continuation], atol=1e-5)
    # 64 tokens; then the other 12, padded to 16, and two options, of 12 contexts, padded to 16.
    assert scorer.num_tokens == 64 + 16 * (16 + 2 * 8)


def test_contexts_with_a_common_beginning_are_scored_as_by_themselves():
    model = small_model(("rat", "rattention"))
    rng = np.random.default_rng(9)
    pairs = []
    for _ in range(2):  # of equal shapes
        beginning = rng.integers(0, V, 66).tolist()
        new = questions(rng, [(length, [3, 2]) for length in range(2, 10)] + [(9, [1])])
        pairs += [([*beginning, *context], continuation) for context, continuation in new]
    scorer, alone = (scorer_of(model, 96, batch_tokens) for batch_tokens in (4096, 79))  # no cache fits into 79 tokens
    together, apart = scorer.score(pairs), alone.score(pairs)
    assert alone.num_tokens >= 80 * len(pairs) and scorer.num_tokens < alone.num_tokens / 2
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=1e-4, atol=1e-4)


def test_which_beginnings_are_common():
    ids = np.arange(200)
    alike = [np.append(ids[: 90 + i], 0) for i in range(8)]  # 90 tokens, and the last one of each is kept
    few = [np.append(ids[1 : 90 + i], 0) for i in range(7)]
    short = [ids[:64]] * 9  # one token must follow
    contexts = [SharedContext(x, [], []) for x in (*alike, *few, *short)]
    found = with_beginnings(contexts)
    assert [context.num_common for context in found] == [80] * 8 + [0] * (7 + 9)
    assert all(one.ids is other.ids for one, other in zip(found, contexts, strict=True))
    equal = with_beginnings([SharedContext(ids[:129], [], [])] * 8)
    assert {context.num_common for context in equal} == {128}


def test_what_would_be_more_to_compute_is_scored_apart():
    scorer = scorer_of(bigram_model()[0])
    scorer.score(questions(np.random.default_rng(3), [(1, [16, 16])]))
    assert scorer.num_tokens == 2 * 16  # the context's one token is padded to 16 where it is read by itself


def test_contexts_that_are_larger_than_a_batch_are_not_read_together():
    rng = np.random.default_rng(7)
    model, table = bigram_model()
    # Texts that nothing precedes have one context, however many there are.
    pairs = [([0], rng.integers(0, V, 2).tolist()) for _ in range(40)]
    fits, too_large = (scorer_of(model, batch_tokens=16 + 16 * 8 - less) for less in (0, 1))
    for scorer in (fits, too_large):
        for (_, continuation), score in zip(pairs, scorer.score(pairs), strict=True):
            assert score.total == pytest.approx(table[[0, continuation[0]], continuation].sum(), abs=1e-4)
    assert fits.num_tokens == 2 * (16 + 16 * 8) + (16 + 8 * 8)
    assert too_large.num_tokens == 32 * 16 + (16 + 8 * 8)  # the first 32 are rows of 16 by themselves


def test_contexts_that_are_cut_differently_are_different():
    """A longer continuation leaves less room, so that less of the context is read."""
    model = small_model(("rnn",), num_layers=1)
    ids = np.random.default_rng(4).integers(0, V, 90).tolist()
    pairs = [(ids[:62], ids[62:64]), (ids[:62], ids[62:80]), (ids[:62], ids[70:72])]
    together = scorer_of(model).score(pairs)
    assert [score.num_dropped for score in together] == [0, 15, 0]
    for pair, score in zip(pairs, together, strict=True):
        (alone,) = scorer_of(model).score([pair])
        np.testing.assert_allclose(score.log_probs, alone.log_probs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_devices", [1, 4])
@pytest.mark.parametrize("batch_tokens", [1, 2000, 16_384])
def test_plans_hold_every_context_once_in_few_shapes_and_bounded_memory(num_devices, batch_tokens):
    rng = np.random.default_rng(5)
    contexts = [
        SharedContext(
            np.zeros(rng.integers(1, 700), np.int32),
            [np.zeros(rng.integers(1, 40), np.int32) for _ in range(rng.choice([2, 4]))],
            [],
        )
        for _ in range(500)
    ]
    plan = plan_contexts(contexts, 1000, batch_tokens, num_devices)
    assert sorted(index for planned in plan for index in planned.contexts) == list(range(500))
    for planned in plan:
        for index in planned.contexts:
            assert len(contexts[index].ids) <= planned.length
            assert len(contexts[index].options) == planned.num_options
            assert max(len(option) - 1 for option in contexts[index].options) <= planned.option_length
        assert len(planned.contexts) <= planned.num_contexts
        assert planned.num_contexts % num_devices == 0
        each = planned.length + planned.num_options * planned.option_length
        assert planned.num_contexts * each <= max(batch_tokens, num_devices * each)
    assert len({(planned.num_options, planned.option_length) for planned in plan}) <= 2 * 2
    assert len({planned.length for planned in plan}) <= 4 * 6  # octaves from 16 to 700


def test_a_few_long_continuations_do_not_lengthen_the_others():
    contexts = [
        SharedContext(np.zeros(20, np.int32), [np.zeros(length, np.int32)] * 2, []) for length in [8] * 19 + [100]
    ]
    plan = plan_contexts(contexts, 200, 10_000, 1)
    assert [(planned.contexts, planned.option_length) for planned in plan] == [([19], 128), (list(range(19)), 8)]


def test_equal_shapes_are_compiled_once():
    model, _ = bigram_model()
    rng = np.random.default_rng(6)
    scorer = scorer_of(model, batch_tokens=500)  # no other test has these shapes
    before = context_scores._cache_size()
    for _ in range(2):
        scorer.score(questions(rng, [(33, [9, 9, 9])] * 7))
    assert context_scores._cache_size() - before == 2  # full batches, and the last one
