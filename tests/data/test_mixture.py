"""Several corpora in one stream of rows: their shares, and that nothing but the row's number decides them."""

import dataclasses
import itertools
import json
from fractions import Fraction

import numpy as np
import pytest

from rat_jax.data import DataError
from rat_jax.data.batch import Batch
from rat_jax.data.corpora import Corpora
from rat_jax.data.mixture import Mixture
from rat_jax.data.pipeline import TrainData
from rat_jax.data.prepare import prepare
from rat_jax.data_config import CorpusConfig, DataConfig
from tests import tiny_sft
from tests.data.prepared import prepare_ids
from tests.tiny_sft import make_examples, write_lines

VOCAB_SIZE = 500
SEQ_LEN = 8
RECORDS = {"large": 61, "small": 5}  # of each corpus; ids of the first are even, of the other odd
WEIGHTS = [[1.0], [1.0, 1.0], [0.7, 0.3], [3.0, 1.0, 1.0], [0.1, 0.2, 0.3, 0.4], [5.0, 1e-3, 2.5], [1.0] * 7]


def by_hand(weights, stop):
    """Rows by their due times, all of them sorted."""
    total = sum(map(Fraction, map(str, weights)))
    due = [
        ((j + Fraction(1, 2)) / (Fraction(str(weight)) / total), corpus, j)
        for corpus, weight in enumerate(weights)
        for j in range(stop)
    ]
    return [(corpus, j) for _, corpus, j in sorted(due)[:stop]]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
class TestOrder:
    """Which corpus a row is of."""

    def test_rows_are_those_of_the_rule(self, weights):
        assert Mixture(weights).rows(0, 200) == by_hand(weights, 200)

    def test_any_part_is_that_of_the_whole(self, weights):
        mixture = Mixture(weights)
        whole = mixture.rows(0, 120)
        for start, stop in itertools.combinations(range(0, 121, 5), 2):
            assert mixture.rows(start, stop) == whole[start:stop]

    def test_shares_are_right_after_every_row(self, weights):
        counts, shares = np.zeros(len(weights)), np.array(weights) / sum(weights)
        bound = (1 - shares) / 2 + shares * (len(weights) - 1) / 2
        for row, (corpus, before) in enumerate(Mixture(weights).rows(0, 3000), start=1):
            assert counts[corpus] == before
            counts[corpus] += 1
            assert (np.abs(counts - shares * row) <= bound + 1e-9).all()

    def test_far_ahead(self, weights):
        start = 10**15
        rows = Mixture(weights).rows(start - 100, start + 100)
        assert Mixture(weights).rows(start, start + 100) == rows[100:]
        for corpus, before in rows[:1]:
            assert abs(before - start * weights[corpus] / sum(weights)) < 200


def test_weights_have_no_unit():
    assert Mixture([0.7, 0.3]).rows(0, 50) == Mixture([7, 3.0]).rows(0, 50)
    assert Mixture([0.1] * 3).rows(0, 50) == Mixture([1.0] * 3).rows(0, 50)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    return {
        name: make_corpus(folder / name, 4 + parity + 2 * (np.arange(RECORDS[name] * SEQ_LEN + 3) % 241))
        for parity, name in enumerate(RECORDS)
    }


def make_corpus(folder, ids, eos=2, validation=None):
    folder.mkdir()
    arrays = (x.astype("<u2") for x in (ids, ids[:20] if validation is None else validation))
    return str(prepare_ids(folder, *arrays, VOCAB_SIZE, eos).path)


def mixed(paths, **changes) -> DataConfig:
    weights = {"large": 2.0, "small": 1.0}
    corpora = {name: CorpusConfig(path, weights.get(name, 1.0)) for name, path in paths.items()}
    return DataConfig(**{"corpora": corpora, "seq_len": SEQ_LEN, "global_batch_size": 4} | changes)


def train_data(config, *, seed=0, host=0, hosts=1) -> TrainData:
    return TrainData(config, vocab_size=VOCAB_SIZE, seed=seed, process_index=host, process_count=hosts)


def take(data, count) -> list[Batch]:
    return list(itertools.islice(data, count))


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        for name in Batch._fields:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def rows_of(batches, parity):
    return [tuple(row) for batch in batches for row in batch.tokens.tolist() if row[0] % 2 == parity]


class TestRows:
    """What the rows of batches are."""

    def test_each_corpus_has_its_share_and_its_own_epochs(self, paths):
        batches = take(train_data(mixed(paths)), 45)  # 180 rows, 120 and 60
        large, small = rows_of(batches, 0), rows_of(batches, 1)
        assert (len(large), len(small)) == (120, 60)
        epochs = [tuple(small[i : i + 5]) for i in range(0, 60, 5)]
        assert all(len(set(epoch)) == 5 and set(epoch) == set(epochs[0]) for epoch in epochs)
        assert len(set(epochs)) > 6  # each in an order of its own
        assert len(set(large[:61])) == 61
        assert large[:59] != large[61:]

    def test_a_row_is_that_of_its_record(self, paths):
        config = mixed(paths, segment_documents=True)
        data = train_data(config)
        for number, batch in enumerate(take(data, 5)):
            for row, (name, record) in enumerate(data.records(number)):
                expected = data.sources[name].rows([record])
                assert_equal([Batch(*(values[row : row + 1] for values in batch))], [expected])

    def test_the_order_is_fixed(self, paths):
        """With another one saved runs could not be continued."""
        data = train_data(mixed(paths), seed=1)
        assert data.records(0) + data.records(1) == [
            *(["large", 50], ["small", 4], ["large", 17], ["large", 21]),
            *(["small", 1], ["large", 20], ["large", 44], ["small", 2]),
        ]

    def test_another_corpus_does_not_change_the_order_of_one(self, paths):
        alone = rows_of(take(train_data(mixed({"large": paths["large"]})), 10), 0)
        assert rows_of(take(train_data(mixed(paths)), 10), 0) == alone[: len(alone) * 2 // 3 + 1]

    @pytest.mark.parametrize("hosts", [2, 4])
    def test_hosts_share_one_global_batch(self, paths, hosts):
        config = mixed(paths, segment_documents=True)
        expected = take(train_data(config), 12)
        parts = [take(train_data(config, host=host, hosts=hosts), 12) for host in range(hosts)]
        together = [Batch(*map(np.concatenate, zip(*rows, strict=True))) for rows in zip(*parts, strict=True)]
        assert_equal(together, expected)

    def test_resume_at_every_batch(self, paths):
        config = mixed(paths)
        expected, data = take(train_data(config), 20), train_data(config)
        for step in range(17):
            resumed = train_data(config, host=1, hosts=2)
            resumed.restore(json.loads(json.dumps(data.state())))
            for batch, whole in zip(take(resumed, 3), expected[step : step + 3], strict=True):
                np.testing.assert_array_equal(batch.tokens, whole.tokens[2:])
            assert_equal([next(data)], [expected[step]])

    @pytest.mark.slow  # of one corpus it is quick
    def test_worker_processes_change_nothing(self, paths):
        data = train_data(mixed(paths, num_workers=2))
        assert_equal(take(data, 9), take(train_data(mixed(paths)), 9))
        data.close()


class TestRefusals:
    """What is no continuation, and what is no mixture."""

    def test_another_mixture_is_no_continuation(self, paths, tmp_path):
        state = train_data(mixed(paths)).state()
        weights = {name: CorpusConfig(path, 1.0) for name, path in paths.items()}
        with pytest.raises(DataError, match=r"other batches: corpora\.large\.weight was 2\.0, is 1\.0; set it back"):
            train_data(mixed(paths, corpora=weights)).restore(state)
        renamed = {"large": paths["large"], "little": paths["small"]}
        with pytest.raises(DataError, match=r"corpora\.little\.weight was None, is 1\.0; corpora\.small\.num"):
            train_data(mixed(renamed)).restore(state)
        with pytest.raises(DataError, match=r"corpora\.small\.num_tokens was 43, is None"):
            train_data(mixed({"large": paths["large"]})).restore(state)
        ids = 5 + 2 * (np.arange(43) % 241)
        other = make_corpus(tmp_path / "other", ids[::-1])
        with pytest.raises(DataError, match=r"other batches: corpora\.small\.content_hash was"):
            train_data(mixed(paths | {"small": other})).restore(state)
        other = make_corpus(tmp_path / "validation", ids, validation=ids[1:20])
        with pytest.raises(DataError, match=r"other batches: corpora\.small\.validation_content_hash was"):
            train_data(mixed(paths | {"small": other})).restore(state)
        single = DataConfig(path=paths["large"], seq_len=SEQ_LEN, global_batch_size=4)
        with pytest.raises(DataError, match=r"num_tokens was None, is 491; .*corpora\.large\.num_tokens was 491"):
            train_data(single).restore(state)

    def test_a_moved_corpus_is_the_same(self, paths, tmp_path):
        moved = make_corpus(tmp_path / "moved", 5 + 2 * (np.arange(43) % 241))
        train_data(mixed(paths | {"small": moved})).restore(train_data(mixed(paths)).state())

    def test_tokenizers_must_be_one(self, paths, tmp_path):
        other = make_corpus(tmp_path / "other", np.arange(3, 60), eos=1)
        message = (
            rf"data\.corpora\.small, {other}, was made by another tokenizer than data\.corpora\.large, {paths['large']}"
        )
        with pytest.raises(DataError, match=message):
            train_data(mixed(paths | {"small": other}))

    def test_each_must_have_a_row(self, paths, tmp_path):
        short = make_corpus(tmp_path / "short", np.arange(3, 8), validation=np.arange(3, 20))
        with pytest.raises(DataError, match=rf"{short}/train\.bin holds 5 tokens, less than one sequence"):
            train_data(mixed(paths | {"small": short}))


def test_documents_and_examples_may_be_mixed(tmp_path):
    """Of the examples answers alone are learned, of the documents everything."""
    records = [{"prompt": f"number {i}:", "answer": f"it is {i}"} for i in range(12)]
    examples = make_examples(tmp_path / "examples", records, records)
    text = write_lines(tmp_path / "documents.jsonl", [{"text": f"a text {i} " * 9} for i in range(20)])
    settings = tiny_sft.settings(text, None, rows=None, seq_len=None)
    documents = prepare(settings, tmp_path / "documents", num_workers=0, overwrite=False)
    config = mixed({"large": str(documents.path), "small": str(examples.path)}, seq_len=32, segment_documents=True)
    data = TrainData(config, vocab_size=257, seed=0)
    for number, batch in enumerate(take(data, 3)):
        for (name, record), weights in zip(data.records(number), batch.loss_weights, strict=True):
            assert weights.mean() > 0.9 if name == "large" else 0 < weights.mean() < 0.7
            np.testing.assert_array_equal(weights, data.sources[name].rows([record]).loss_weights[0])


def test_chat_templates_must_be_one(tmp_path):
    records = [{"prompt": f"number {i}:", "answer": f"it is {i}"} for i in range(12)]
    corpus = make_examples(tmp_path / "examples", records, records)
    first, second = (
        dataclasses.replace(corpus, examples=dataclasses.replace(corpus.examples, chat_template_hash=digit * 64))
        for digit in "01"
    )
    Corpora({"a": first, "b": corpus, "c": first}).check()
    with pytest.raises(DataError, match=rf"data\.corpora\.c, {corpus.path}, was made with another chat template than"):
        Corpora({"a": first, "b": corpus, "c": second}).check()
