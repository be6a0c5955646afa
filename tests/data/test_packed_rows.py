"""Training documents in rows: which tokens are where, and what a run makes of them."""

import dataclasses
import json

import numpy as np
import pytest

from rat_jax.data import DataError, packed_rows
from rat_jax.data.batch import Batch
from rat_jax.data.corpus import Corpus
from rat_jax.data.pipeline import TrainData, ValidationData
from rat_jax.data.prepare import main
from rat_jax.data_config import DataConfig
from tests.data.prepared import all_ids, command, run, texts_of

T, EOS = 64, 256
LENGTHS = (1, 3, 5, 9, 17, 61, 62, 63, 64, 125, 126, 127, 200)
TEXTS = ["x" * n + "yz" for n in LENGTHS] + [f"text {i}" for i in range(40)]


@pytest.fixture
def packed(settings, tmp_path):
    """Settings of a packed corpus of `TEXTS`, in files of these names."""
    folder = tmp_path / "many"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03d}.txt").write_text(text)
    validation = str(tmp_path / "texts")
    return dataclasses.replace(
        settings, source=(str(folder),), validation_source=(validation,), packing="best_fit", seq_len=T
    )


def config_of(corpus: Corpus, **changes) -> DataConfig:
    return DataConfig(
        **{"path": str(corpus.path), "seq_len": T, "global_batch_size": 4, "segment_documents": True} | changes
    )


def pieces_by_hand():
    pieces = []
    for text in TEXTS:
        ids = [*text.encode(), EOS]
        pieces += [tuple(ids[i : i + T]) for i in range(0, len(ids), T)]
    return sorted(piece for piece in pieces if len(piece) > 1)


def all_rows(corpus) -> Batch:
    windows = TrainData(config_of(corpus), vocab_size=257, seed=0).sources[""]
    return windows.rows(list(range(windows.num_full)))


@pytest.mark.parametrize("at_a_time", [1, 300, packed_rows.PACKED_TOKENS])
def test_rows_hold_every_piece_once_and_padding(packed, tmp_path, monkeypatch, at_a_time):
    monkeypatch.setattr(packed_rows, "PACKED_TOKENS", at_a_time)
    corpus = run(packed, tmp_path / "corpus")
    batch, found, num_padding = all_rows(corpus), [], 0
    for tokens, targets, weights, segments in zip(*batch, strict=True):
        rest = tokens.tolist()
        start, number = 0, 1
        while start < T and not (start and rest[start] == EOS):
            stop = rest.index(EOS, start) + 1 if EOS in rest[start:] else T
            found.append(tuple(rest[start:stop]))
            inside = slice(start, min(stop, T - 1))
            assert targets[inside].tolist() == rest[start + 1 : inside.stop + 1]
            is_learned = [token != EOS for token in rest[inside]]
            assert weights[inside].tolist() == is_learned
            assert set(segments[inside]) == {number}
            start, number = stop, number + 1
        assert rest[start:] == [EOS] * (T - start)
        assert not weights[start:].any() and not any(segments[start:])
        num_padding += T - start
    assert sorted(found) == pieces_by_hand()
    figures = corpus.splits["train"]
    assert (figures.num_padding, figures.num_documents) == (num_padding, len(found))
    assert figures.num_targets == batch.loss_weights.sum()
    assert corpus.total.num_padding == num_padding


def test_the_validation_split_is_that_of_any_corpus(packed, tmp_path):
    plain = run(dataclasses.replace(packed, packing=None, seq_len=None), tmp_path / "plain")
    corpus = run(packed, tmp_path / "corpus")
    ids = [all_ids(of.token_file("validation")) for of in (plain, corpus)]
    np.testing.assert_array_equal(*ids)
    assert plain.splits["validation"] == corpus.splits["validation"]
    assert plain.splits["train"].num_bytes == corpus.splits["train"].num_bytes
    (batch, *_) = ValidationData(config_of(corpus, seq_len=16), vocab_size=257)  # of any length
    assert batch.tokens.shape == (4, 16)


def test_processes_change_nothing(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(packed_rows, "PACKED_TOKENS", 500)
    alone, two = run(packed, tmp_path / "alone"), run(packed, tmp_path / "two", num_workers=2)
    np.testing.assert_array_equal(*(all_ids(corpus.token_file("train")) for corpus in (alone, two)))


def test_runs_resume_on_any_number_of_hosts_and_the_rows_are_in_the_fingerprint(packed, tmp_path):
    corpus = run(packed, tmp_path / "corpus")
    data = TrainData(config_of(corpus), vocab_size=257, seed=0)
    expected = [next(data) for _ in range(9)]
    state = json.loads(json.dumps(data.state() | {"next_batch": 5}))
    for host in range(2):
        part = TrainData(config_of(corpus), vocab_size=257, seed=0, process_index=host, process_count=2)
        part.restore(state)
        for batch in expected[5:]:
            for name, mine in next(part)._asdict().items():
                np.testing.assert_array_equal(mine, getattr(batch, name)[2 * host : 2 * host + 2])
    assert data.fingerprint["packed"] is True
    plain = run(dataclasses.replace(packed, packing=None, seq_len=None), tmp_path / "plain")
    with pytest.raises(DataError, match=r"other batches: .*content_hash was .*packed was True, is None"):
        TrainData(config_of(plain), vocab_size=257, seed=0).restore(state)


def test_rows_of_another_length_are_refused(packed, tmp_path):
    corpus = run(packed, tmp_path / "corpus")
    with pytest.raises(
        DataError, match=rf"{corpus.path} holds rows of 64 tokens, and data\.seq_len is 32: set it to 64 "
    ):
        TrainData(config_of(corpus, seq_len=32), vocab_size=257, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": None}, "--packing wants --seq_len, the tokens of a row, 2 or more; got None"),
        ({"seq_len": 1}, "--packing wants --seq_len"),
        (
            {"packing": None},
            "--seq_len is for rows: give --rows packed or padded for examples, --packing for documents",
        ),
        ({"packing": "first_fit"}, "--packing must be one of best_fit, got 'first_fit'"),
        ({"rows": "packed"}, "--packing is for documents; examples are packed by --rows packed"),
        ({"source": ("release-bin:a",), "validation_source": ("release-bin:b",)}, "release-bin uses files as they are"),
    ],
)
def test_flags_that_do_not_go_together(packed, tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        run(dataclasses.replace(packed, **changes), tmp_path / "corpus")


def test_the_command_says_how_much_is_padding_and_knows_its_work(text_folder, tmp_path, capsys):
    arguments = command(text_folder, tmp_path / "corpus", "--packing", "best_fit", "--seq_len", "512")
    assert main(arguments) == 0
    corpus = Corpus.open(tmp_path / "corpus")
    share = corpus.total.num_padding / corpus.splits["train"].num_tokens
    assert (
        f"pieces of longer ones (each is counted): {share:.2%} of their tokens are padding" in capsys.readouterr().out
    )
    assert main(arguments) == 0
    assert "already prepared" in capsys.readouterr().out
    assert main([*arguments[:-1], "256"]) != 0
    assert "seq_len: 512 there, 256 now" in capsys.readouterr().err
    assert len(texts_of(text_folder)) > 1
