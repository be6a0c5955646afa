"""Corpora of examples: what batches learn, the mask is checked as the ids are, settings are refused by name."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from rat_jax.data import DataError
from rat_jax.data.chat_template import FILE
from rat_jax.data.corpus import Corpus
from rat_jax.data.pipeline import TrainData, ValidationData
from rat_jax.data.prepare import main, prepare
from rat_jax.data.row import ADDED_BYTES
from rat_jax.data.token_header import HEADER_BYTES
from rat_jax.data_config import DataConfig
from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.perplexity import check_length
from tests.data.test_chat_template import CHATML, chat
from tests.tiny_sft import make_examples, settings, write_lines

SEQ_LEN = 32
TRAIN = [{"prompt": f"{i}?" * (1 + i % 5), "answer": ["yes"[: 1 + i % 3], "no"][: 1 + i % 2]} for i in range(10, 40)]
VALIDATION = [{"prompt": f"{i}!", "answer": "ok"} for i in range(5)]
EOS = 256


def data_config(corpus, **changes) -> DataConfig:
    values = {"path": str(corpus.path), "seq_len": SEQ_LEN, "global_batch_size": 4, "segment_documents": True}
    return DataConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make_examples(tmp_path_factory.mktemp("packed"), TRAIN, VALIDATION)


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    return make_examples(tmp_path_factory.mktemp("padded"), TRAIN, VALIDATION, rows="padded")


@pytest.fixture
def copy(tmp_path):
    return make_examples(tmp_path, TRAIN, VALIDATION)


def texts(records) -> list[tuple[str, str]]:
    return sorted((record["prompt"], answer) for record in records for answer in np.atleast_1d(record["answer"]))


def learned(batch) -> list[tuple[str, str]]:
    """Prompt and answer of every example of a batch, as its arrays have them."""
    found = []
    for tokens, targets, weights, segments in zip(*(np.asarray(x) for x in batch), strict=True):
        for segment in sorted(set(segments) - {0}):
            (places,) = np.nonzero(segments == segment)
            assert (np.diff(places) == 1).all()
            ids = tokens[places]
            is_learned = weights[places] > 0
            assert set(weights[places]) <= {0, 1}
            np.testing.assert_array_equal(targets[places][is_learned], ids[1:][is_learned[:-1]])
            answer = list(targets[places][is_learned])
            assert answer[-1] == EOS and EOS not in answer[:-1]
            assert list(ids[-len(answer) :]) == answer  # all of the answer, and nothing but it
            found.append((bytes(ids[: -len(answer)].tolist()).decode(), bytes(answer[:-1]).decode()))
        assert not weights[segments == 0].any()
    return found


def all_learned(batches) -> list[tuple[str, str]]:
    return [example for batch in batches for example in learned(batch)]


def test_an_epoch_learns_every_answer_once(packed):
    data = TrainData(data_config(packed, global_batch_size=1), vocab_size=257, seed=0)
    batches = list(itertools.islice(data, data.num_records))
    assert sorted(all_learned(batches)) == texts(TRAIN)
    figures = packed.examples.splits["train"]
    assert data.num_records == figures.num_rows < figures.num_examples == len(texts(TRAIN))
    assert figures.num_tokens == sum(len(prompt) + len(answer) + 1 for prompt, answer in texts(TRAIN))
    assert figures.num_answer_tokens == sum(batch.loss_weights.sum() for batch in batches)
    assert figures.num_cut == figures.num_left_out == 0
    assert packed.examples.num_steps(4) == -(-figures.num_rows // 4)


def test_padded_rows_hold_one_example(padded):
    data = TrainData(data_config(padded, global_batch_size=1), vocab_size=257, seed=0)
    batches = list(itertools.islice(data, data.num_records))
    assert all(len(learned(batch)) == 1 for batch in batches)
    assert sorted(all_learned(batches)) == texts(TRAIN)
    without = TrainData(data_config(padded, segment_documents=False, global_batch_size=1), vocab_size=257, seed=0)
    for batch, other in zip(batches, without, strict=False):
        assert other.segment_ids is None
        for name in ("tokens", "targets", "loss_weights"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(other, name))


def test_validation_is_in_order_and_filled_with_padding(padded):
    batches = list(ValidationData(data_config(padded), vocab_size=257))
    assert [len(learned(batch)) for batch in batches] == [4, 1]
    assert all_learned(batches) == texts(VALIDATION)


def test_rows_without_a_target_are_refused_in_words(padded):
    """Five rows in batches of four: the padding behind them has none either."""
    with pytest.raises(DataError, match="no target"):
        ValidationData(data_config(padded, first_target_id=EOS + 1), vocab_size=257)


def test_rows_are_read_in_sequences_of_their_length(padded):
    check_length(padded, SEQ_LEN)
    with pytest.raises(EvaluationError, match="rows of 32 tokens, and cannot be read in sequences of 16: give 32"):
        check_length(padded, 16)


def test_low_ids_can_be_left_out_of_the_loss(padded):
    (batch, *_) = ValidationData(data_config(padded, first_target_id=ord("l")), vocab_size=257)
    assert [chr(i) for i in batch.targets[0][batch.loss_weights[0] > 0]] == ["o", chr(EOS)]


def test_training_continues_where_it_was(packed):
    data = TrainData(data_config(packed), vocab_size=257, seed=1)
    next(data)
    state, after = json.loads(json.dumps(data.state())), [next(data) for _ in range(5)]
    again = TrainData(data_config(packed), vocab_size=257, seed=1)
    again.restore(state)
    for batch in after:
        for one, other in zip(batch, next(again), strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_number_of_hosts_does_not_change_the_batches(packed):
    whole = next(TrainData(data_config(packed), vocab_size=257, seed=1))
    parts = [
        next(TrainData(data_config(packed), vocab_size=257, seed=1, process_index=i, process_count=2)) for i in range(2)
    ]
    for array, *halves in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(array, np.concatenate(halves))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"seq_len": 16},
            r"holds rows of 32 tokens, and data\.seq_len is 16: set it to 32, or prepare .* --seq_len 16",
        ),
        (
            {"segment_documents": False},
            r"which must not see each other: set data\.segment_documents to True, or prepar",
        ),
        ({"first_target_id": 257}, r"no target counts in the loss"),
    ],
)
def test_what_does_not_fit_the_rows_is_refused(packed, changes, message):
    with pytest.raises(DataError, match=message):
        TrainData(data_config(packed, **changes), vocab_size=257, seed=0)


@pytest.mark.parametrize("part", ["ids", "segment_ids", "is_answer"])
def test_every_part_of_a_row_is_checked(copy, part):
    place = {"ids": 0, "segment_ids": 2 * SEQ_LEN, "is_answer": 6 * SEQ_LEN}[part]
    path = copy.path / "train.bin"
    content = bytearray(path.read_bytes())
    content[HEADER_BYTES + (2 + ADDED_BYTES) * SEQ_LEN + place] ^= 1  # of row 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train\.bin: block 0 of 1 .* is not what was written"):
        Corpus.open(copy.path).verify()
    with pytest.raises(DataError, match="is not what was written"):
        next(TrainData(data_config(copy), vocab_size=257, seed=0))


def test_the_mask_is_part_of_the_fingerprint(tmp_path, copy):
    """The same ids with other answers are other data."""
    moved = [{"prompt": record["prompt"] + "n", "answer": "o"} for record in TRAIN]
    kept = [{"prompt": record["prompt"], "answer": "no"} for record in TRAIN]
    one, other = (make_examples(tmp_path / name, records, VALIDATION) for name, records in (("a", moved), ("b", kept)))
    files = [corpus.token_file("train") for corpus in (one, other)]
    for index in range(one.examples.splits["train"].num_rows):
        rows = [file.read_row(index) for file in files]
        np.testing.assert_array_equal(rows[0].ids, rows[1].ids)
    state = TrainData(data_config(one), vocab_size=257, seed=0).state()
    with pytest.raises(DataError, match="content_hash was"):
        TrainData(data_config(other), vocab_size=257, seed=0).restore(state)


def test_files_of_other_rows_are_noticed(tmp_path, packed):
    shorter = make_examples(tmp_path, TRAIN, VALIDATION, seq_len=64)
    for name in ("train.bin", "validation.bin"):
        (shorter.path / name).write_bytes((packed.path / name).read_bytes())
    with pytest.raises(DataError, match="is not the file that"):
        Corpus.open(shorter.path).token_file("train")
    with pytest.raises(DataError, match=r"has row_tokens 32, but .* says 64"):
        dataclasses.replace(Corpus.open(shorter.path), header_hashes=None).token_file("train")


def test_counts_that_contradict_each_other(copy):
    figures = dataclasses.replace(copy.examples.splits["train"], num_rows=10**6)
    dataclasses.replace(
        copy, examples=dataclasses.replace(copy.examples, splits={**copy.examples.splits, "train": figures})
    ).write_metadata()
    with pytest.raises(
        DataError, match=r"metadata\.json, examples, train is damaged: its counts contradict each other"
    ):
        Corpus.open(copy.path)


def test_prompts_that_are_cut_and_answers_that_are_left_out_are_counted(tmp_path, capsys):
    train = write_lines(
        tmp_path / "t.jsonl", [*TRAIN, {"prompt": "p" * 99, "answer": "a"}, {"prompt": "p", "answer": "a" * 31}]
    )
    validation = write_lines(tmp_path / "v.jsonl", VALIDATION)
    arguments = ["--source", str(train), "--validation_source", str(validation), "--tokenizer", "bytes", "--rows"]
    arguments += ["packed", "--seq_len", "32", "--num_workers", "0", "--out", str(tmp_path / "corpus")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    corpus = Corpus.open(tmp_path / "corpus")
    figures = corpus.examples.splits["train"]
    assert (figures.num_cut, figures.num_left_out) == (1, 1)
    assert f"{figures.num_tokens / figures.num_rows / 32:.1%} of their tokens are examples" in said
    assert "1 prompts cut in the middle, 1 answers too long and left out" in said
    assert "config.training.num_steps=1 at config.data.global_batch_size=128" in said
    assert main(arguments) == 0 and "already prepared" in capsys.readouterr().out
    assert main([*arguments, "--verify"]) == 0
    assert main([*arguments[:7], "padded", *arguments[8:]]) == 2
    assert "rows: 'packed' there, 'padded' now" in capsys.readouterr().err


def test_prompts_decide_the_split_where_there_is_one_source(tmp_path):
    records = [{"prompt": f"{i % 20}", "answer": f"{i}"} for i in range(60)]
    corpus = prepare(
        settings(write_lines(tmp_path / "a.jsonl", records), None), tmp_path / "c", num_workers=0, overwrite=False
    )
    prompts = {}
    for split in ("train", "validation"):
        config = data_config(corpus, global_batch_size=1)
        kind = TrainData(config, vocab_size=257, seed=0) if split == "train" else ValidationData(config, vocab_size=257)
        batches = itertools.islice(kind, corpus.examples.splits[split].num_rows)
        prompts[split] = [prompt for batch in batches for prompt, _ in learned(batch)]
    assert not set(prompts["train"]) & set(prompts["validation"])
    assert len(prompts["train"]) + len(prompts["validation"]) == 60


def test_a_tokenizer_is_trained_on_texts_not_on_their_json(tmp_path):
    records = [{"prompt": f"what is number {i}?", "answer": "number"} for i in range(30)]
    corpus = make_examples(tmp_path, records, records[:3], tokenizer="bpe:280")
    ids = corpus.tokenizer().encode("number")
    assert len(ids) <= 2
    assert '"' not in {corpus.tokenizer().decode([i]) for i in range(270, 280)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": "packt"}, "--rows must be one of packed, padded, got 'packt'"),
        ({"seq_len": None}, "--rows wants --seq_len, the tokens of a row, 2 or more; got None"),
        ({"rows": None}, "--seq_len is for rows: give --rows packed or padded for examples, --packing"),
        ({"rows": None, "seq_len": None, "chat_template": "x"}, "--chat_template is for examples"),
        ({"source": ("recall:5",)}, "recall:5 holds text, and --rows wants examples"),
        ({"source": ("text:t.jsonl",)}, r"t\.jsonl holds text, and --rows wants examples"),
        ({"seq_len": 3}, r"no examples in the train split: all 45 answers .* raise it"),
        ({"validation_source": ()}, "no examples in the .* split at --validation_fraction 1e-09: change the fraction"),
        ({"field": "body"}, "--field and --document_separator are for documents, and have no effect with --rows"),
        ({"document_separator": "x"}, "--field and --document_separator are for documents"),
        ({"chat_template": "/no/such/file"}, "/no/such/file cannot be read"),
    ],
)
def test_settings_that_make_no_examples(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    files = [write_lines(tmp_path / f"{n}.jsonl", r) for n, r in (("t", TRAIN), ("v", VALIDATION))]
    if changes.get("seq_len") == 3:
        write_lines(files[0], [{"prompt": "p", "answer": "aaa"}] * 45)
    changes = {"validation_fraction": 1e-9, **changes}
    with pytest.raises(DataError, match=message):
        prepare(settings(*files, **changes), tmp_path / "corpus", num_workers=0, overwrite=False)
    assert not (tmp_path / "corpus").exists()


def test_a_record_that_is_no_example_is_named(tmp_path):
    with pytest.raises(DataError, match=r"train\.jsonl, line 31: prompt is empty"):
        make_examples(tmp_path, [*TRAIN, {"prompt": "", "answer": "a"}], VALIDATION)


def test_parquet(tmp_path, padded):
    import pyarrow
    import pyarrow.parquet

    rows = [{**record, "answer": list(np.atleast_1d(record["answer"])), "id": 3} for record in TRAIN]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    validation = write_lines(tmp_path / "v.jsonl", VALIDATION)
    corpus = prepare(
        settings(tmp_path / "t.parquet", validation, rows="padded"), tmp_path / "c", num_workers=0, overwrite=False
    )
    assert [corpus.token_file("train").header.content_hash] == [padded.token_file("train").header.content_hash]


class TestChats:
    @pytest.fixture
    def corpus(self, tmp_path):
        (tmp_path / "chatml.jinja").write_text(CHATML)
        records = [{"messages": chat("hello", f"number {i}", "more", "bye")} for i in range(4)]
        return make_examples(
            tmp_path, records, records, seq_len=256, rows="padded", chat_template=str(tmp_path / "chatml.jinja")
        )

    def test_every_answer_is_learned(self, corpus):
        (batch, *_) = ValidationData(data_config(corpus, seq_len=256), vocab_size=257)
        for number, (targets, weights) in enumerate(zip(batch.targets, batch.loss_weights, strict=True)):
            answers = "".join("$" if i == EOS else chr(i) for i in targets[weights > 0])
            assert answers == f"number {number}<|im_end|>\n$bye<|im_end|>\n$"

    def test_the_template_lies_beside_the_tokenizer(self, corpus, tmp_path):
        assert corpus.chat_template().source == CHATML
        records = [{"messages": chat("a", "b")}]
        again = make_examples(tmp_path / "more", records, records, seq_len=256, tokenizer=str(corpus.path))
        assert again.chat_template() == corpus.chat_template()

    def test_another_template_is_noticed(self, corpus, tmp_path):
        (tmp_path / "chatml.jinja").write_text(CHATML + " ")
        train, validation = tmp_path / "train.jsonl", tmp_path / "validation.jsonl"
        changes = {"seq_len": 256, "rows": "padded", "chat_template": str(tmp_path / "chatml.jinja")}
        with pytest.raises(DataError, match="was prepared with another chat template than there is now"):
            prepare(settings(train, validation, **changes), corpus.path, num_workers=0, overwrite=False)
        (corpus.path / FILE).unlink()
        with pytest.raises(DataError, match="its chat template is not the one that made its tokens"):
            corpus.chat_template()
