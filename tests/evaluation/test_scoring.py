"""Scores of given tokens: exact numbers, whatever else is in the batch, in few compiled shapes."""

import jax
import numpy as np
import pytest
from flax import nnx

from rat_jax.evaluation import scoring
from rat_jax.evaluation.row_batches import PACKED_LENGTH, plan_batches
from rat_jax.evaluation.scoring import EvaluationError, Scorer, batch_scores, rolling_windows
from rat_jax.model import LanguageModel
from rat_jax.release.weights import release_state_dict
from tests.small import bigram_model, small_model
from tests.test_twin import make_twin, random_config

torch = pytest.importorskip("torch")

V = 31
START = 0


def make_scorer(model: LanguageModel, context_length: int = 40, batch_tokens: int = 256) -> Scorer:
    return Scorer(model, None, context_length=context_length, batch_tokens=batch_tokens)


def random_ids(rng, count: int) -> list[int]:
    return rng.integers(0, V, count).tolist()


@pytest.fixture(scope="module")
def bigrams():
    return bigram_model()


def test_scores_are_those_of_a_known_distribution(bigrams):
    model, table = bigrams
    rng = np.random.default_rng(0)
    pairs = [(random_ids(rng, rng.integers(1, 30)), random_ids(rng, rng.integers(1, 10))) for _ in range(20)]
    pairs.append(([3], [int(np.argmax(table[3]))]))
    scores = make_scorer(model).score(pairs)
    for (context, continuation), score in zip(pairs, scores, strict=True):
        before = [context[-1], *continuation[:-1]]
        np.testing.assert_allclose(score.log_probs, table[before, continuation], atol=1e-5)
        np.testing.assert_array_equal(score.greedy, table[before].argmax(axis=-1) == continuation)
        assert score.total == pytest.approx(table[before, continuation].sum(), abs=1e-4)
        assert score.is_greedy == score.greedy.all()
        assert score.num_dropped == 0
    assert scores[-1].is_greedy
    assert not all(score.is_greedy for score in scores)


def test_documents_of_a_known_distribution(bigrams):
    model, table = bigrams
    rng = np.random.default_rng(1)
    documents = [random_ids(rng, count) for count in (1, 39, 40, 41, 80, 137)]
    for document, score in zip(documents, make_scorer(model).score_rolling(documents, START), strict=True):
        before = [START, *document[:-1]]
        np.testing.assert_allclose(score.log_probs, table[before, document], atol=1e-5)
        np.testing.assert_array_equal(score.greedy, table[before].argmax(axis=-1) == document)


@pytest.mark.parametrize(
    ("pattern", "changes"),
    [
        pytest.param(("rat", "local_attention"), {}, marks=pytest.mark.slow),
        (("rattention", "attention"), {"num_kv_heads": 2}),
    ],
    ids=str,
)
def test_neither_padding_nor_other_rows_matter(pattern, changes):
    model = small_model(pattern, **changes)
    rng = np.random.default_rng(2)
    pairs = [(random_ids(rng, context), random_ids(rng, rng.integers(1, 9))) for context in (30, 1, 7, 3, 12, 19)]
    forward = jax.jit(lambda tokens: model(tokens))
    together = make_scorer(model).score(pairs)
    for pair, score in zip(pairs, together, strict=True):
        ids = np.concatenate(pair)
        # Whole rows of one length: the tokens and, after them, others than the padding of the batch.
        tokens = np.concatenate([ids[:-1], rng.integers(0, V, 40 - len(ids) + 1)])
        logits = np.asarray(forward(tokens[None]), np.float64)[0, len(pair[0]) - 1 : len(ids) - 1]
        want = (logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))[np.arange(len(pair[1])), pair[1]]
        np.testing.assert_allclose(score.log_probs, want, rtol=1e-4, atol=1e-4)


def test_texts_that_share_a_row_do_not_see_each_other():
    model = small_model(("rat", "local_attention"))
    rng = np.random.default_rng(11)
    pairs = [(random_ids(rng, 75), random_ids(rng, 1 + number % 8)) for number in range(12)]
    packed, apart = make_scorer(model, 128, PACKED_LENGTH), make_scorer(model, 128, 128)
    for one, other in zip(packed.score(pairs), apart.score(pairs), strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(one.greedy, other.greedy)
    assert packed.num_tokens == PACKED_LENGTH  # one row


def test_scores_equal_the_twins():
    config, num_tokens = random_config(("rat", "local_attention"), 0)
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    for path, param in nnx.to_flat_state(nnx.state(model)):
        if path[-1] in ("kernel", "embedding"):
            param[...] = param[...] * 10
    twin = make_twin(config)
    twin.load_state_dict({name: torch.tensor(x) for name, x in release_state_dict(model).items()})
    ids = np.random.default_rng(3).integers(0, config.vocab_size, num_tokens)
    with torch.no_grad():
        want = twin(torch.tensor(ids[None])).log_softmax(-1)[0].numpy()
    (score,) = make_scorer(model).score([(ids[:4], ids[4:])])
    np.testing.assert_allclose(score.log_probs, want[np.arange(3, num_tokens - 1), ids[4:]], atol=1e-4)
    np.testing.assert_array_equal(score.greedy, want[3:-1].argmax(axis=-1) == ids[4:])


@pytest.fixture(scope="module")
def recurrent():
    """A model in which every earlier token matters."""
    return small_model(("rnn",), num_layers=1)


def test_a_text_that_fits_is_one_pair(recurrent):
    document = random_ids(np.random.default_rng(4), 40)
    scorer = make_scorer(recurrent)
    (whole,), (pair,) = scorer.score_rolling([document], START), scorer.score([([START], document)])
    np.testing.assert_array_equal(whole.log_probs, pair.log_probs)
    np.testing.assert_array_equal(whole.greedy, pair.greedy)


def test_windows_read_what_fits_before_their_tokens(recurrent):
    document = random_ids(np.random.default_rng(5), 97)
    scorer = make_scorer(recurrent)
    (rolled,) = scorer.score_rolling([document], START)
    parts = scorer.score(
        [([START], document[:40]), (document[39:40], document[40:80]), (document[56:80], document[80:])]
    )
    np.testing.assert_allclose(rolled.log_probs, np.concatenate([part.log_probs for part in parts]), rtol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 6, 13, 15])
def test_windows_predict_every_token_once(num_tokens):
    document = np.arange(1, num_tokens + 1)
    windows = list(rolling_windows(document, 0, 5))
    np.testing.assert_array_equal(np.concatenate([continuation for _, continuation in windows]), document)
    for context, continuation in windows:
        assert context[-1] == continuation[0] - 1
        assert len(context) + len(continuation) - 1 == min(5, num_tokens)  # tokens read


def test_of_a_context_too_long_the_end_is_read(recurrent):
    ids = random_ids(np.random.default_rng(6), 60)
    scorer = make_scorer(recurrent)
    long, cut = scorer.score([(ids[:50], ids[50:]), (ids[19:50], ids[50:])])
    assert (long.num_dropped, cut.num_dropped) == (19, 0)
    np.testing.assert_allclose(long.log_probs, cut.log_probs, rtol=1e-5)
    assert scorer.score([(ids[:20], ids[20:])])[0].num_dropped == 19  # of the context, one token stays


def test_few_programs_are_compiled(bigrams):
    model, _ = bigrams
    scorer = make_scorer(model, context_length=60, batch_tokens=208)  # no other test has these shapes
    pairs = [([1] * length, [2]) for length in range(2, 61)]
    plan = plan_batches([len(context) for context, _ in pairs], 60, 208, 1)
    shapes = {(batch.num_rows, batch.length) for batch in plan}
    assert sorted(shapes) == [(3, 60), (4, 48), (6, 32), (13, 16)]
    before = batch_scores._cache_size()
    scorer.score(pairs)
    assert batch_scores._cache_size() - before == len(shapes)
    scorer.score(pairs[::-1])
    assert batch_scores._cache_size() - before == len(shapes)


def test_blocks_of_logits_do_not_matter(recurrent, monkeypatch):
    pair = (random_ids(np.random.default_rng(9), 9), random_ids(np.random.default_rng(10), 13))
    (whole,) = make_scorer(recurrent).score([pair])
    monkeypatch.setattr("rat_jax.loss._BLOCK_LOGITS", 7 * V)
    (blocks,) = make_scorer(recurrent, context_length=21).score([pair])  # a shape of its own
    np.testing.assert_allclose(blocks.log_probs, whole.log_probs, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(blocks.greedy, whole.greedy)


def test_batches_are_shown_as_they_go(bigrams):
    seen = []

    def progress(batches, num_batches):
        for batch in batches:
            seen.append((batch.tokens.shape, num_batches))
            yield batch

    pairs = [([first] + [1] * 19, [2]) for first in range(3)] + [([1] * 5, [2])]
    make_scorer(bigrams[0], batch_tokens=64).score(pairs, progress)
    assert seen == [((2, 32), 2), ((2, 32), 2)]
    assert make_scorer(bigrams[0]).score([]) == make_scorer(bigrams[0]).score_rolling([], START) == []


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([1], []), "pair 1: the continuation has no tokens"),
        (([], [1]), "pair 1: the context has no tokens: give at least one"),
        (([1], [2] * 41), "pair 1: the continuation has 41 tokens, more than the context length of 40"),
        (([1, V], [2]), "pair 1, context, position 1: token id 31 is outside the vocabulary of 31"),
        (([1, 2], [-1]), "pair 1, continuation, position 0: token id -1 is outside"),
        (([1, 2**40], [1]), "pair 1, context, position 1: token id 1099511627776 is outside"),
    ],
)
def test_pairs_that_cannot_be_scored(bigrams, pair, message):
    with pytest.raises(EvaluationError, match=message):
        make_scorer(bigrams[0]).score([([1], [2]), pair])


def test_documents_and_settings_that_cannot_be_scored(bigrams):
    scorer = make_scorer(bigrams[0])
    with pytest.raises(EvaluationError, match="document 1 has no tokens"):
        scorer.score_rolling([[1], []], START)
    with pytest.raises(EvaluationError, match="document 0, position 100: token id 99 is outside"):
        scorer.score_rolling([[1] * 100 + [99]], START)
    with pytest.raises(EvaluationError, match="start_id, position 0: token id 50 is outside"):
        scorer.score_rolling([[1]], 50)
    with pytest.raises(EvaluationError, match="batch_tokens must be 1 or more, got 0"):
        make_scorer(bigrams[0], batch_tokens=0)
    with pytest.raises(EvaluationError, match="context_length must be 1 or more, got -1"):
        make_scorer(bigrams[0], context_length=-1)


def test_a_model_that_is_not_finite_is_refused():
    model = small_model(("rnn",))
    model.final_norm.scale[...] = model.final_norm.scale[...] * np.nan
    with pytest.raises(EvaluationError, match="pair 0: a log-probability is not finite"):
        make_scorer(model).score([([1], [2])])


def test_a_device_that_runs_out_of_memory_is_a_message(bigrams, monkeypatch):
    def refuse(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(scoring, "batch_scores", refuse)
    with pytest.raises(EvaluationError, match="batches of 256 tokens need more memory than is free; lower batch_token"):
        make_scorer(bigrams[0]).score([([1], [2])])
