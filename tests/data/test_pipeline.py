import dataclasses
import functools
import itertools
import json

import numpy as np
import pytest

from rat_jax.data import DataError
from rat_jax.data.corpus import Corpus
from rat_jax.data.integrity import BLOCK_BYTES
from rat_jax.data.pipeline import Batch, TrainData, ValidationData, check_fingerprint, describe_coverage
from rat_jax.data_config import DataConfig
from tests.data import format_1
from tests.data.prepared import prepare_ids

EOS = 2
VOCAB_SIZE = 500
SEQ_LEN = 8


def make_ids(num_tokens: int) -> np.ndarray:
    """Ids that are all different from their neighbours, with an end of a document now and then."""
    ids = 3 + np.arange(num_tokens) % (VOCAB_SIZE - 3)
    ids[np.random.default_rng(num_tokens).random(num_tokens) < 0.15] = EOS
    return ids.astype("<u2")


TRAIN = make_ids(29 * SEQ_LEN + 4)  # 29 records and some tokens that fill none
VALIDATION = make_ids(9 * SEQ_LEN + 6)  # 9 records and one of 5 targets


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    return make_corpus(folder, TRAIN, VALIDATION)


def make_corpus(folder, train, validation):
    return prepare_ids(folder, train, validation, VOCAB_SIZE, EOS, overwrite=True).path


@pytest.fixture
def config(path) -> DataConfig:
    return DataConfig(
        path=str(path), seq_len=SEQ_LEN, global_batch_size=4, segment_documents=False, first_target_id=0, num_workers=0
    )


def train_data(config, *, seed=0, host=0, hosts=1) -> TrainData:
    return TrainData(config, vocab_size=VOCAB_SIZE, seed=seed, process_index=host, process_count=hosts)


def validation_data(config, *, host=0, hosts=1, max_batches=None) -> ValidationData:
    return ValidationData(
        config, vocab_size=VOCAB_SIZE, max_batches=max_batches, process_index=host, process_count=hosts
    )


def take(data, count) -> list[Batch]:
    return list(itertools.islice(data, count))


def assert_equal(left: list[Batch], right: list[Batch]):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for name in Batch._fields:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def windows(ids, seq_len=SEQ_LEN):
    """Inputs and targets of each record, by slices of a list."""
    ids = ids.tolist()
    return [
        (ids[i : i + seq_len], ids[i + 1 : i + seq_len + 1]) for i in range(0, len(ids) - 1, seq_len) if ids[i + 1 :]
    ]


def test_train_epochs_hold_every_record_once(config):
    full = [tuple(inputs) for inputs, targets in windows(TRAIN) if len(targets) == SEQ_LEN]
    target_of = dict(zip(full, (tuple(targets) for _, targets in windows(TRAIN)), strict=False))
    data = train_data(config)
    assert data.num_records == len(full) == len(set(full)) == 29
    batches = take(data, 29)  # 4 epochs
    rows = [tuple(row) for batch in batches for row in batch.tokens.tolist()]
    epochs = [rows[i : i + 29] for i in range(0, len(rows), 29)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(full)
    assert len({tuple(epoch) for epoch in [full, *epochs]}) == 5  # each in another order
    for batch in batches:
        for inputs, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            assert tuple(targets) == target_of[tuple(inputs)]


def test_shapes_and_types(config):
    (batch,) = take(train_data(dataclasses.replace(config, segment_documents=True)), 1)
    for value, dtype in zip(batch, (np.int32, np.int32, np.float32, np.int32), strict=True):
        assert value.shape == (4, SEQ_LEN)
        assert value.dtype == dtype
        assert value.flags.c_contiguous
    assert take(train_data(config), 1)[0].segment_ids is None


def test_seeds(config):
    first, same, other = (take(train_data(config, seed=seed), 10) for seed in (3, 3, 4))
    assert_equal(first, same)
    assert any((a.tokens != b.tokens).any() for a, b in zip(first, other, strict=True))
    # A second seed is not the first one an epoch later.
    rows = [[tuple(row) for batch in batches for row in batch.tokens.tolist()] for batches in (first, other)]
    assert rows[0][29:] != rows[1][: len(rows[0][29:])]
    for seed in (-1, 2**32):
        with pytest.raises(DataError, match=f"seed must lie between 0 and 2\\*\\*32 - 1, got {seed}"):
            train_data(config, seed=seed)


def test_order_is_fixed(config):
    """The order of records belongs to the file format: with another one, saved runs could not be continued."""
    number = {tuple(inputs): i for i, (inputs, _) in enumerate(windows(TRAIN))}
    rows = [number[tuple(row)] for batch in take(train_data(config, seed=1), 3) for row in batch.tokens.tolist()]
    assert rows == [10, 5, 25, 3, 8, 23, 9, 2, 0, 22, 6, 1]


def test_loss_is_masked_where_the_input_ends_a_document(config):
    batches = [*take(train_data(config), 8), *list(validation_data(config))[:2]]
    for batch in batches:
        np.testing.assert_array_equal(batch.loss_weights, np.where(batch.tokens == EOS, 0.0, 1.0))
    assert any((batch.tokens == EOS).any() for batch in batches)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_segments_count_documents(config, split):
    config = dataclasses.replace(config, segment_documents=True)
    batches = take(train_data(config), 8) if split == "train" else list(validation_data(config))[:2]
    most = 0
    for batch in batches:
        for tokens, segments in zip(batch.tokens.tolist(), batch.segment_ids.tolist(), strict=True):
            expected, segment = [], 1
            for token in tokens:
                expected.append(segment)
                segment += token == EOS
            assert segments == expected
            most = max(most, *segments)
    assert most >= 2


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 16])
@pytest.mark.parametrize("segment_documents", [False, True])
def test_validation_is_every_token_once_in_order(config, batch_size, segment_documents):
    config = dataclasses.replace(config, global_batch_size=batch_size, segment_documents=segment_documents)
    data = validation_data(config)
    batches = list(data)
    assert len(batches) == len(data) == -(-10 // batch_size)
    joined = [None if field[0] is None else np.concatenate(field) for field in zip(*batches, strict=True)]
    tokens, targets, weights, segments = joined
    assert len(tokens) == len(data) * batch_size
    num = len(VALIDATION) - 1
    flat = [values.reshape(-1) for values in (tokens, targets, weights)]
    np.testing.assert_array_equal(flat[0][:num], VALIDATION[:-1])
    np.testing.assert_array_equal(flat[1][:num], VALIDATION[1:])
    np.testing.assert_array_equal(flat[2][:num], VALIDATION[:-1] != EOS)
    assert not flat[1][num:].any()
    assert not flat[2][num:].any()
    if segment_documents:
        assert (segments.reshape(-1)[:num] > 0).all()
        assert not segments.reshape(-1)[num:].any()
    assert_equal(list(data), batches)  # another pass is the same


@pytest.mark.parametrize(("num_tokens", "num_records", "num_targets"), [(9, 1, 8), (10, 2, 9), (2, 1, 1), (17, 2, 16)])
def test_validation_lengths(tmp_path, config, num_tokens, num_records, num_targets):
    ids = 3 + np.arange(num_tokens, dtype="<u2")
    data = validation_data(dataclasses.replace(config, path=str(make_corpus(tmp_path, TRAIN, ids))))
    assert data.num_records == num_records
    assert sum(batch.loss_weights.sum() for batch in data) == num_targets


@pytest.mark.parametrize(("batch_size", "max_batches"), [(1, 1), (4, 1), (4, 5), (10, 9), (3, 33)])
def test_a_subset_of_the_validation_is_evenly_spread(tmp_path, config, batch_size, max_batches):
    num_records, num_taken = 103, batch_size * max_batches
    ids = 3 + np.arange(num_records * SEQ_LEN + 1, dtype="<u2") // SEQ_LEN  # record i holds i + 3
    path = str(make_corpus(tmp_path, TRAIN, ids))
    data = validation_data(
        dataclasses.replace(config, path=path, global_batch_size=batch_size), max_batches=max_batches
    )
    taken = np.concatenate([batch.tokens[:, 0] for batch in data]) - 3
    assert (len(data), len(taken), data.fraction) == (max_batches, num_taken, num_taken / num_records)
    gaps = np.diff(taken)
    assert not len(gaps) or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)
    assert abs(taken[0] - num_records / num_taken / 2) <= 1
    assert abs(num_records - taken[-1] - num_records / num_taken / 2) <= 1


def test_a_subset_of_all_batches_is_the_whole_validation(config):
    whole = validation_data(config)
    for max_batches in (len(whole), len(whole) + 1):
        data = validation_data(config, max_batches=max_batches)
        assert_equal(list(data), list(whole))
        assert data.fraction == whole.fraction == 1


def test_coverage_in_words():
    assert describe_coverage(1.0) == "the whole validation split"
    assert describe_coverage(256 / 1786) == "14.3 % of the validation split, evenly spread"
    assert describe_coverage(0.0001234) == "0.0123 % of the validation split, evenly spread"


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_one_global_batch(config, hosts):
    config = dataclasses.replace(config, segment_documents=True)
    subset = functools.partial(validation_data, max_batches=2)
    expected = [take(train_data(config), 12), list(validation_data(config)), list(subset(config))]
    for make, batches in zip((train_data, validation_data, subset), expected, strict=True):
        parts = [take(make(config, host=host, hosts=hosts), len(batches)) for host in range(hosts)]
        for part in itertools.chain(*parts):
            assert part.tokens.shape == (4 // hosts, SEQ_LEN)
        together = [Batch(*map(np.concatenate, zip(*rows, strict=True))) for rows in zip(*parts, strict=True)]
        assert_equal(together, batches)


def test_hosts_default_to_those_of_jax(config):
    assert_equal(take(TrainData(config, vocab_size=VOCAB_SIZE, seed=0), 3), take(train_data(config), 3))


@pytest.mark.parametrize("make", [train_data, validation_data])
def test_hosts_that_do_not_divide_the_batch(config, make):
    with pytest.raises(DataError, match=r"data\.global_batch_size 4 does not divide among 3 hosts"):
        make(config, hosts=3)


def test_resume_at_every_step(config):
    """Over the end of the first epoch (after 7.25 batches), through JSON, on another number of hosts."""
    expected = take(train_data(config), 20)
    data = train_data(config)
    for step in range(16):
        state = json.loads(json.dumps(data.state()))
        resumed = train_data(config)
        next(resumed)  # whatever was read before
        resumed.restore(state)
        assert_equal(take(resumed, 4), expected[step : step + 4])
        assert resumed.state()["next_batch"] == step + 4
        half = train_data(config, host=1, hosts=2)
        half.restore(state)
        np.testing.assert_array_equal(next(half).tokens, expected[step].tokens[2:])
        assert_equal([next(data)], [expected[step]])


def test_resume_far_ahead(config):
    """After many epochs, without reading what came before."""
    data = train_data(config)
    data.restore(data.state() | {"next_batch": 10**12})
    again = train_data(config)
    again.restore(again.state() | {"next_batch": 10**12 - 1})
    next(again)
    assert_equal(take(data, 3), take(again, 3))


def test_worker_processes_change_nothing(config):
    config = dataclasses.replace(config, segment_documents=True)
    workers = dataclasses.replace(config, num_workers=2)
    expected = take(train_data(config), 13)
    data = train_data(workers)
    assert_equal(take(data, 5), expected[:5])
    alone = train_data(config)
    alone.restore(data.state())
    assert_equal(take(alone, 3), expected[5:8])
    data.restore(alone.state())
    assert_equal(take(data, 5), expected[8:])
    data.close()


@pytest.mark.slow
@pytest.mark.parametrize("part", [{}, {"max_batches": 2}], ids=["all", "a part"])
def test_a_worker_process_changes_nothing_of_the_validation(config, part):
    config = dataclasses.replace(config, segment_documents=True)
    passes = validation_data(dataclasses.replace(config, num_workers=1), **part)
    assert_equal(list(passes), list(validation_data(config, **part)))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("seq_len", {"seq_len": 7}),
        ("global_batch_size", {"global_batch_size": 8}),
        ("segment_documents", {"segment_documents": True}),
    ],
)
def test_resume_with_another_config_is_refused(config, name, changes):
    state = train_data(config).state()
    with pytest.raises(DataError, match=f"belongs to other batches: {name} was"):
        train_data(dataclasses.replace(config, **changes)).restore(state)


def test_resume_with_another_seed_or_corpus_is_refused(config, tmp_path):
    state = train_data(config).state()
    with pytest.raises(DataError, match="belongs to other batches: seed was 0, is 1;"):
        train_data(config, seed=1).restore(state)
    ids = TRAIN.copy()
    ids[3] += 1
    other = dataclasses.replace(config, path=str(make_corpus(tmp_path, ids, VALIDATION)))
    with pytest.raises(DataError, match="other batches: content_hash was"):
        train_data(other).restore(state)
    ids = VALIDATION.copy()
    ids[3] += 1
    other = dataclasses.replace(config, path=str(make_corpus(tmp_path, TRAIN, ids)))
    with pytest.raises(DataError, match="other batches: validation_content_hash was"):
        train_data(other).restore(state)


@pytest.mark.parametrize("changes", [{"next_batch": -1}, {"next_batch": "3"}, {"next_batch": True}, {"fingerprint": 1}])
def test_a_damaged_position_is_refused(config, changes):
    data = train_data(config)
    with pytest.raises(DataError, match="the saved position of the data is damaged"):
        data.restore(data.state() | changes)


def test_check_fingerprint(config):
    current = train_data(config).fingerprint
    assert set(current) == {
        *("format_version", "num_tokens", "content_hash", "validation_content_hash", "tokenizer_hash", "vocab_size"),
        *("seq_len", "global_batch_size", "segment_documents", "seed"),
    }
    check_fingerprint(json.loads(json.dumps(current)), current)
    for name in current:
        with pytest.raises(DataError, match=f"other batches: {name} was 'x', is "):
            check_fingerprint(current | {name: "x"}, current)
        without = {key: value for key, value in current.items() if key != name}
        if name == "validation_content_hash":  # which was not always saved
            check_fingerprint(without, current)
            continue
        with pytest.raises(DataError, match=f"other batches: {name} was None, is "):
            check_fingerprint(without, current)
    with pytest.raises(DataError, match="seq_len was 1, is 8; seed was 2, is 0; later was 3, is None"):
        check_fingerprint(current | {"seq_len": 1, "seed": 2, "later": 3}, current)


def test_moved_corpus_is_the_same_corpus(config, tmp_path):
    """Other paths, same content."""
    state = train_data(config).state()
    moved = train_data(dataclasses.replace(config, path=str(make_corpus(tmp_path, TRAIN, VALIDATION))))
    moved.restore(state)
    assert_equal([next(moved)], take(train_data(config), 1))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_id_outside_the_vocabulary(config, tmp_path, num_workers):
    path = make_corpus(tmp_path, TRAIN, VALIDATION)
    format_1.rewrite_corpus(path)  # in which no digest shows it before
    ids = VALIDATION.copy()
    ids[3 * SEQ_LEN + 5] = VOCAB_SIZE
    ids.tofile(tmp_path / "validation_ids.bin")
    data = validation_data(dataclasses.replace(config, path=str(path), global_batch_size=1, num_workers=num_workers))
    batches = iter(data)
    assert len(take(batches, 3)) == 3
    message = r"validation\.bin, record 3 of 8 tokens, position 5 \(token 29 of the file\): id 500 is outside the vocab"
    with pytest.raises(DataError, match=message):
        next(batches)


@pytest.mark.parametrize("make", [TrainData, ValidationData])
def test_vocabulary_of_another_size(config, make):
    arguments = {"seed": 0} if make is TrainData else {}
    for vocab_size in (499, 501):
        with pytest.raises(DataError, match=rf"has a vocabulary of 500, but the model's is {vocab_size}: set"):
            make(config, vocab_size=vocab_size, **arguments)


def test_splits_that_are_too_short(config, tmp_path):
    config = dataclasses.replace(config, path=str(make_corpus(tmp_path, TRAIN[:8], VALIDATION[:1])))
    with pytest.raises(DataError, match=r"train\.bin holds 8 tokens, less than one sequence of data\.seq_len 8"):
        train_data(config)
    with pytest.raises(DataError, match=r"validation\.bin holds 1 tokens, too few to predict one"):
        validation_data(config)


@pytest.mark.parametrize("make", [train_data, validation_data])
def test_splits_without_a_target_that_counts_are_refused(config, tmp_path, make):
    ids = np.resize([5, 9, EOS, 9], 40).astype("<u2")  # the 9 after an end is no target
    config = dataclasses.replace(config, path=str(make_corpus(tmp_path, ids, ids)))
    make(dataclasses.replace(config, first_target_id=9))
    with pytest.raises(DataError, match=r"no target counts in the loss.*data\.first_target_id 10"):
        make(dataclasses.replace(config, first_target_id=10))


def test_one_record_is_enough(config, tmp_path):
    config = dataclasses.replace(config, path=str(make_corpus(tmp_path, TRAIN[:9], VALIDATION)))
    (batch,) = take(train_data(config), 1)
    np.testing.assert_array_equal(batch.tokens, np.stack([TRAIN[:8]] * 4))


def test_missing_corpus(config, tmp_path):
    with pytest.raises(DataError, match="is not a prepared corpus"):
        train_data(dataclasses.replace(config, path=str(tmp_path / "gone")))


def test_another_tokenizer_is_refused(config, tmp_path):
    corpus = Corpus.open(config.path)
    corpus.check_tokenizer(tmp_path / "none")  # an imported model's workdir may hold none
    corpus.tokenizer().save(tmp_path)
    corpus.check_tokenizer(tmp_path)
    other = dataclasses.replace(corpus, tokenizer_hash="0" * 64)
    with pytest.raises(DataError, match="was made by another tokenizer than the model's, which is in"):
        other.check_tokenizer(tmp_path)


LARGE = make_ids(3 * BLOCK_BYTES // 2)  # of three blocks


@pytest.fixture
def large(tmp_path, config) -> DataConfig:
    """Of a corpus with three blocks of training ids, which are in train_ids.bin."""
    return dataclasses.replace(config, path=str(make_corpus(tmp_path, LARGE, VALIDATION)))


def overwrite(path, position: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(content)


def test_changed_ids_are_refused_before_they_are_in_a_batch(large, tmp_path):
    overwrite(tmp_path / "train_ids.bin", BLOCK_BYTES + 6, b"\x05\x00\x06\x00")
    with pytest.raises(DataError, match=r"train_ids\.bin: block 1 of 3 \(bytes 65536 to 131071\) is not what was"):
        take(train_data(large), 300)


def test_a_file_overwritten_while_it_is_read_is_refused(large, tmp_path):
    data = train_data(large)
    take(data, 300)  # all blocks were read, and found right
    overwrite(tmp_path / "train_ids.bin", 2 * BLOCK_BYTES, LARGE.tobytes()[2 * BLOCK_BYTES :])
    take(data, 300)  # with what was there
    overwrite(tmp_path / "train_ids.bin", 2 * BLOCK_BYTES + 6, b"\x05\x00\x06\x00")
    with pytest.raises(DataError, match=r"train_ids\.bin: block 2 of 3"):
        take(data, 300)


def test_a_file_cut_short_while_it_is_read_is_refused(large, tmp_path):
    data = train_data(large)
    take(data, 300)
    with (tmp_path / "train_ids.bin").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(DataError, match=r"train_ids\.bin was cut short while it was in use"):
        take(data, 300)


def test_a_file_replaced_while_it_is_read_does_not_matter(large, tmp_path):
    """What is open stays what it was."""
    expected = take(train_data(large), 100)
    data = train_data(large)
    take(data, 1)
    other = tmp_path / "other"
    other.write_bytes(bytes(LARGE.nbytes))
    other.rename(tmp_path / "train_ids.bin")
    assert_equal(take(data, 99), expected[1:])
    with pytest.raises(DataError, match=r"train_ids\.bin: block \d of 3"):
        take(train_data(large), 100)
