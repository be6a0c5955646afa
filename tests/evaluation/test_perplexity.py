"""Losses of the validation split: every token once, whatever the batch, by position."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from rat_jax import loss
from rat_jax.checkpoints.store import LoadedModel
from rat_jax.config import MeshConfig
from rat_jax.data.corpus import Corpus, Statistics
from rat_jax.data.pipeline import ValidationData
from rat_jax.evaluation import perplexity as evaluation
from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.perplexity import Evaluation, PositionSums, bucket_edges, check_fits, evaluate
from rat_jax.evaluation.report import table
from rat_jax.model import LanguageModel
from rat_jax.sharding import make_mesh
from rat_jax.training.step import batch_loss
from tests.tiny_run import make_corpus, tiny_config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return Corpus.open(make_corpus(tmp_path_factory.mktemp("evaluation")))


def make_loaded(corpus, **changes) -> LoadedModel:
    config = tiny_config(corpus.path, model__pattern=("rnn",), **changes)  # what compiles fastest
    model = LanguageModel(config.model, rngs=nnx.Rngs(0))
    model.embedding[...] = model.embedding[...] * 10
    return LoadedModel(config, model, step=0, path=corpus.path)


@pytest.fixture(scope="module")
def loaded(corpus):
    return make_loaded(corpus)


def run(loaded, corpus, context_length: int = 16, batch_tokens: int = 64, max_batches: int | None = None) -> Evaluation:
    mesh = make_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1])
    return evaluate(loaded, corpus, mesh, context_length, batch_tokens=batch_tokens, max_batches=max_batches)


@pytest.mark.parametrize("segment_documents", [True, False])
def test_losses_equal_the_definition(corpus, segment_documents):
    loaded = make_loaded(corpus, data__segment_documents=segment_documents)
    result = run(loaded, corpus)
    file = corpus.token_file("validation")
    ids = file.read(0, len(file)).astype(np.int32)
    loss, weight = np.zeros(16), np.zeros(16)
    graphdef, params = nnx.split(loaded.model)
    forward = jax.jit(lambda params, tokens, segments: nnx.merge(graphdef, params)(tokens, segments))
    for start in range(0, len(ids) - 1, 16):
        window = ids[start : start + 17]
        tokens = np.zeros((1, 16), np.int32)
        tokens[0, : len(window) - 1] = window[:-1]
        ends = tokens == 0  # the id that ends documents
        segments = np.cumsum(ends, axis=1) - ends + 1 if segment_documents else np.ones_like(tokens)
        logits = np.asarray(forward(params, tokens, segments), np.float64)[0]
        for position, target in enumerate(window[1:]):
            if window[position] != 0:
                loss[position] += np.log(np.exp(logits[position]).sum()) - logits[position, target]
                weight[position] += 1
    np.testing.assert_array_equal(result.sums.weight, weight)
    np.testing.assert_allclose(result.sums.loss, loss, rtol=1e-5)
    assert result.num_targets == weight.sum() == len(ids) - 1 - (ids[:-1] == 0).sum()
    assert result.loss == pytest.approx(loss.sum() / weight.sum(), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(loss.sum() / weight.sum()), rel=1e-5)


def test_the_batch_size_does_not_matter(loaded, corpus):
    results = [run(loaded, corpus, batch_tokens=batch_tokens) for batch_tokens in (1, 80, 10_000)]
    for result in results[1:]:
        np.testing.assert_array_equal(result.sums.weight, results[0].sums.weight)
        np.testing.assert_allclose(result.sums.loss, results[0].sums.loss, rtol=1e-5)


def test_blocks_of_logits_do_not_matter(loaded, corpus, monkeypatch):
    whole = run(loaded, corpus, context_length=24)
    monkeypatch.setattr(loss, "_BLOCK_LOGITS", 5 * 29 * 7)  # 7 positions of 5 rows: does not divide 24
    blocks = run(loaded, corpus, context_length=24, batch_tokens=120)  # of 5 rows no other test compiles a program
    np.testing.assert_allclose(blocks.sums.loss, whole.sums.loss, rtol=1e-5)


def test_every_context_length_has_the_same_targets(loaded, corpus):
    lengths = (8, 16, 50)
    results = [run(loaded, corpus, context_length=length) for length in lengths]
    assert len({result.num_targets for result in results}) == 1
    assert [len(result.sums.loss) for result in results] == list(lengths)


@pytest.mark.parametrize("max_batches", [None, 2])
def test_the_loss_is_that_of_the_validation_while_training(loaded, corpus, max_batches):
    graphdef, params = nnx.split(loaded.model)
    data = ValidationData(loaded.config.data, vocab_size=29, max_batches=max_batches)
    parts = [batch_loss(graphdef, params, batch) for batch in data]
    mean = sum(float(part.loss) for part in parts) / sum(float(part.weight) for part in parts)
    result = run(loaded, corpus, batch_tokens=8 * 16, max_batches=max_batches)
    assert result.loss == pytest.approx(mean, rel=1e-5)
    assert result.fraction == data.fraction


def test_max_batches_takes_a_part_of_the_split_or_all_of_it(loaded, corpus):
    whole, two, many = (run(loaded, corpus, max_batches=number) for number in (None, 2, 10_000))
    num_records = -(-(len(corpus.token_file("validation")) - 1) // 16)
    assert (whole.fraction, two.fraction, many.fraction) == (1, 2 * 4 / num_records, 1)
    assert many.num_targets == whole.num_targets > two.num_targets
    assert "loss on the whole validation split\n" in table([whole])
    assert f"loss on {100 * 8 / num_records:.3g} % of the validation split, evenly spread\n" in table([two])


def make_evaluation(loss: list[float], weight: list[float], num_bytes: int | None = None, **changes) -> Evaluation:
    """Of a split with one document whose first token is the only one that is no target."""
    statistics = Statistics(1, round(sum(weight)) + 1, num_bytes, None)
    return Evaluation(len(loss), 1.0, PositionSums(np.array(loss), np.array(weight)), statistics, **changes)


def test_bits_per_byte():
    evaluation = make_evaluation([6.0, 2.0], [3.0, 1.0], num_bytes=16)
    assert evaluation.loss == 2.0
    assert evaluation.bits_per_byte == pytest.approx(8.0 / math.log(2) / 16)  # all nats, all bytes
    assert make_evaluation([6.0], [3.0]).bits_per_byte is None
    assert make_evaluation([6.0], [3.0], num_bytes=16, first_target_id=1).bits_per_byte is None


def test_buckets_hold_every_position_once():
    assert bucket_edges(10, 1) == [0, 10]
    assert bucket_edges(16, 4) == [0, 16]
    assert bucket_edges(100, 1) == [0, 16, 32, 64, 100]
    assert bucket_edges(40, 4) == [0, 16, 20, 24, 28, 32, 40]
    weight = np.arange(100.0)
    evaluation = make_evaluation((weight * 3).tolist(), weight.tolist())
    buckets = evaluation.buckets(per_octave=4)
    assert [bucket.first for bucket in buckets[1:]] == [bucket.last + 1 for bucket in buckets[:-1]]
    assert sum(bucket.num_targets for bucket in buckets) == weight.sum()
    assert {bucket.loss for bucket in buckets} == {3.0}


def test_a_model_that_is_not_finite_is_refused(loaded, corpus):
    damaged = make_loaded(corpus)
    damaged.model.final_norm.scale[...] = damaged.model.final_norm.scale[...] * np.nan
    with pytest.raises(EvaluationError, match="the loss at position 0 is not finite"):
        run(damaged, corpus)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_length": 0}, "context length must be 1 or more, got 0"),
        ({"batch_tokens": 0}, "batch_tokens must be 1 or more, got 0"),
        ({"max_batches": 0}, "max_batches must be 1 or more, got 0"),
        ({"context_length": 10**7}, "context length 10,000,000 is longer than the validation split of"),
    ],
)
def test_settings_out_of_range_are_refused(loaded, corpus, settings, message):
    with pytest.raises(EvaluationError, match=message):
        run(loaded, corpus, **settings)


def test_a_split_without_targets_is_refused(loaded, corpus):
    mesh = make_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1])
    (batch, *_) = ValidationData(loaded.config.data, vocab_size=29)
    empty = batch._replace(loss_weights=np.zeros_like(batch.loss_weights))
    with pytest.raises(EvaluationError, match="no token of the validation split counts"):
        evaluation.sum_losses(loaded.model, [empty], mesh)


@pytest.mark.parametrize(
    ("context_length", "batch_tokens", "free", "message"),
    [
        (
            400,
            10**9,
            10**9,
            r"batches of 2,500,000 sequences need at least [\d,.]+ GiB .* has 0.9 GiB free; lower batch_",
        ),
        (400, 1, 100, "batches of 1 sequences need at least 0.0 GiB .*; choose a shorter context"),
        (16, 64, 5000, "batches of 4 sequences need"),  # more than the least, less than what is compiled
    ],
)
def test_memory_that_is_not_there_is_missed_before_the_work(
    loaded, corpus, monkeypatch, context_length, batch_tokens, free, message
):
    mesh = make_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1])
    monkeypatch.setattr(evaluation, "sum_losses", None)
    monkeypatch.setattr(evaluation, "free_bytes", lambda device: free)
    with pytest.raises(EvaluationError, match=message):
        evaluate(loaded, corpus, mesh, context_length, batch_tokens=batch_tokens, max_batches=None)
    monkeypatch.setattr(evaluation, "free_bytes", lambda device: None)  # a platform that does not tell
    check_fits(loaded, corpus, mesh, context_length, batch_tokens)


def test_a_device_that_runs_out_of_memory_is_a_message(loaded, corpus, monkeypatch):
    def refuse(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(evaluation, "sum_losses", refuse)
    with pytest.raises(
        EvaluationError, match="batches of 4 sequences need more memory than is free; lower batch_tokens"
    ):
        run(loaded, corpus)
