"""The page: every figure on it is the one that the files hold."""

import json
import math
import re

import pytest

from rat_jax.checkpoints.workdir import Workdir
from rat_jax.data.prepare import Settings, prepare
from rat_jax.data.tokenizer import IdTokenizer
from tests.report.workdirs import (
    HARNESS,
    RECORDS,
    SECTIONS,
    add_answers,
    add_evaluations,
    add_lengths,
    add_ruler,
    add_scores,
    add_tasks,
    evaluation,
    make_workdir,
    page_of,
    ruler_result,
    training,
    validation,
)

PROGRESS, LOSSES = "How far each run is", "Losses of checkpoints on validation splits"
SPEED, CACHES = "Speed of training, over all devices", "Cache of a row: bytes a token, and all of it in parentheses"
# Embedding and final norm; two layers of norms, q, k, v, the output's projection and the MLP, of 16 channels and 32.
NUM_PARAMETERS = 29 * 16 + 16 + 2 * (2 * 16 + 16 * 48 + 16 * 16 + 2 * 16 * 32)


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def test_how_far_runs_are(folder):
    first = make_workdir(folder / "first")
    second = make_workdir(folder / "second", training__num_steps=40, saved_step=2)
    rows = page_of(first, second).cells(PROGRESS)
    assert rows[f"first {first}"] == {
        "state": "finished, 6 steps",
        "mixers": "attention",
        "parameters": f"{NUM_PARAMETERS:,}",
        "tokens read": "768",  # 6 steps of 8 rows of 16 tokens
        "tokenizer": "bytes, 257 ids",
        "validation loss": "2.6250",
        "at step": "6",
        "measured on": "12.5 % of the validation split, evenly spread",
    }
    assert rows[f"second {second}"]["state"] == "step 6 of 40"


def test_curves_of_training(folder):
    shown = page_of(make_workdir(folder / "run"))
    by_step, by_tokens = "Loss by step", "Loss by tokens"
    assert list(shown.charts) == [by_step, by_tokens]
    assert shown.charts[by_step] == "run, training: 3 at 1, 2.5 at 6; run, validation: 2.75 at 4, 2.625 at 6"
    assert shown.charts[by_tokens] == "run, training: 3 at 128, 2.5 at 768; run, validation: 2.75 at 512, 2.625 at 768"
    assert {"optimizer step", "loss, nats a token", "2", "4", "6", "2.6", "2.8"} <= set(shown.chart_texts[by_step])
    assert {"tokens read", "200", "400", "600"} <= set(shown.chart_texts[by_tokens])


def test_curves_of_several_corpora(folder):
    records = (validation(4, 2.75) | {"validation_loss/code": 3.0}, validation(6, 2.5) | {"validation_loss/code": 2.25})
    shown = page_of(make_workdir(folder / "run", records=records))
    assert shown.charts["Loss by step"] == (
        "run, validation: 2.75 at 4, 2.5 at 6; run, validation of code: 3 at 4, 2.25 at 6"
    )


def test_a_log_of_old_code_has_no_means(folder):
    shown = page_of(make_workdir(folder / "run", records=({"step": 1, "loss": 4.0}, {"step": 2, "loss": None})))
    assert shown.charts["Loss by step"] == "run, training: 4 at 1, 4 at 1"


def test_losses_of_checkpoints(folder):
    first, second = make_workdir(folder / "first"), make_workdir(folder / "second")
    add_evaluations(first, evaluation(16, 2.0, bits=1.5), evaluation(32, 1.75, fraction=0.5))
    add_evaluations(first, evaluation(16, 9.0, bits=1.0), step=4)  # of an earlier step
    add_evaluations(second, evaluation(16, 2.25, bits=1.25))
    shown = page_of(first, second)
    assert shown.tables[LOSSES] == [
        ["run", "step", "context", "tokens", "nats a token", "perplexity", "bits a byte", "nats a byte", "bytes"],
        # nats a byte = 1.5 ln 2; bytes = 2 * 800 / (1.5 ln 2)
        ["first mine: the whole validation split", "6", "16", "800", "2.0000", "7.389", "1.5000", "1.0397", "1,539"],
        ["second mine: the whole validation split", "6", "16", "800", "2.2500", "9.488", "1.2500", "0.8664", "2,077"],
        ["first mine: 50 % of the validation split, evenly spread", "6", "32", "800", "1.7500", "5.755", "–", "–", "–"],
    ]
    assert "Evaluations of earlier steps that are left out: 1." in shown.notes
    assert "The losses are of different parts of the split: compare rows of the same part alone." in shown.notes
    title = "Loss by position, context 16, on the whole validation split"
    # From the middle of positions 1 .. 4, counted from 1, to that of 13 .. 16; the bucket without targets is no point.
    assert shown.charts[title] == "first, step 6: 3 at 2, 2 at 14.422; second, step 6: 3.25 at 2, 2.25 at 14.422"
    assert [text for text in shown.chart_texts[title] if text in ("2", "4", "8")] == ["2", "4", "8"]


def test_losses_of_other_data_are_told_apart(folder):
    first, second = make_workdir(folder / "first"), make_workdir(folder / "second")
    add_evaluations(first, evaluation(16, 2.0), data="/a/text")
    add_evaluations(second, evaluation(16, 2.0), data="/b/text")
    shown = page_of(first, second)
    assert "The losses are of different data: compare rows of the same data alone." in shown.notes
    assert {row[0] for row in shown.tables[LOSSES][1:]} == {
        "first a/text: the whole validation split",
        "second b/text: the whole validation split",
    }
    assert sum(title.startswith("Loss by position") for title in shown.charts) == 2


def test_scores_of_tasks(folder):
    first, second = make_workdir(folder / "first"), make_workdir(folder / "second")
    add_tasks(first, {"arc": (0.5, 0.02, 100), "piqa": (0.625, 0.01, 100), "drop": "no data"})
    add_tasks(first, {"later": (0.25, None, 7)}, name="tasks-6-more.json")
    add_tasks(second, {"arc": (0.52, 0.02, 100), "piqa": (0.65, 0.015, 100)})
    add_scores(first, "RULER", [{"name": "niah, 16 tokens", "metric": "match", "value": 98}], seed=0)
    shown = page_of(first, second)
    one, two = "first step 6", "second step 6"
    assert shown.cells(HARNESS) == {
        "arc acc, 100 documents": {one: "0.5000 ± 0.0200", two: "0.5200 ± 0.0200"},
        "piqa acc, 100 documents": {one: "0.6250 ± 0.0100", two: "0.6500 ± 0.0150"},
        "later acc, 7 documents": {one: "0.2500", two: "–"},
    }
    assert shown.strong == ["0.6500 ± 0.0150"]  # ahead by 0.025, of which the error is 0.018
    assert shown.cells("RULER") == {"niah, 16 tokens match": {one: "98.00"}}
    assert "Settings: num_fewshot none; limit 100." in shown.notes
    assert "Settings: seed 0." in shown.notes
    assert "first, step 6: drop failed: no data" in shown.notes


def test_scores_under_other_settings_are_not_ranked(folder):
    first, second = make_workdir(folder / "first"), make_workdir(folder / "second")
    add_tasks(first, {"arc": (0.1, 0.01, 100)}, num_fewshot=0)
    add_tasks(first, {"arc": (0.2, 0.01, 100)}, num_fewshot=5, name="tasks-6-more.json")
    add_tasks(second, {"arc": (0.9, 0.01, 100)}, num_fewshot=0)
    shown = page_of(first, second)
    assert shown.tables[HARNESS] == [
        ["task", "first step 6", "first step 6", "second step 6"],
        ["num_fewshot", "0", "5", "0"],
        ["arc acc, 100 documents", "0.1000 ± 0.0100", "0.2000 ± 0.0100", "0.9000 ± 0.0100"],
    ]
    assert shown.strong == []
    assert "The settings differ: no score is marked as the best." in shown.notes


def test_losses_beyond_the_training_length(folder):
    first, second = make_workdir(folder / "first"), make_workdir(folder / "second")
    add_lengths(first, 2.0, 2.5)
    add_lengths(second, 2.25, None)
    shown = page_of(first, second)
    split = "mine: the whole validation split"
    assert shown.tables["Losses at positions within and beyond the training length"] == [
        ["run", "step", "trained on", "context", "tokens", "within, nats", "beyond, nats", "difference"],
        [f"first {split}", "6", "16", "64", "1,600", "2.0000", "2.5000", "0.5000"],
        [f"second {split}", "6", "16", "64", "1,600", "2.2500", "–", "–"],
    ]
    title = "Loss by position beyond the training length, context 64, on the whole validation split"
    # The middle of 1 .. 16, and of 17 .. 64.
    assert shown.charts == shown.charts | {
        title: "first, step 6: 2 at 4, 2.5 at 32.985; second, step 6: 2.25 at 4, 2.25 at 4"
    }
    assert "position in the row, tokens" in shown.chart_texts[title]
    assert ("path", "class", "mark") in shown.attributes
    add_lengths(second, 2.25, 2.75, trained=32)  # two training lengths have no common mark
    assert ("path", "class", "mark") not in page_of(first, second).attributes


def test_scores_of_ruler_and_of_answers(folder):
    first, second = make_workdir(folder / "first"), make_workdir(folder / "second")
    add_ruler(
        first,
        ruler_result("niah", 32, 60.0, 5.0),
        ruler_result("vt", 16, 4.0, None),
        ruler_result("niah", 16, 98.5, 1.5),
        {"task": "vt", "context_length": 32, "error": "no room"},
    )
    add_ruler(second, ruler_result("niah", 32, 80.0, 5.0), context_lengths=[32])
    add_answers(first, rouge_l=12.5, exact_match=2.5)
    shown = page_of(first, second)
    one, two = "first step 6", "second step 6"
    assert shown.cells("RULER") == {
        "niah, 16 tokens string_match_all, %, 50 documents": {one: "98.50 ± 1.50", two: "–"},
        "niah, 32 tokens string_match_all, %, 50 documents": {one: "60.00 ± 5.00", two: "80.00 ± 5.00"},
        "vt, 16 tokens string_match_all, %, 50 documents": {one: "4.0000", two: "–"},
    }
    assert shown.strong == ["80.00 ± 5.00"]
    assert "Settings: seed 0; num_examples 50." in shown.notes
    assert "first, step 6: vt, 32 tokens failed: no room" in shown.notes
    assert shown.cells("Answers to prompts") == {
        "test.jsonl rouge_l, %, 40 documents": {one: "12.50"},
        "test.jsonl exact_match, %, 40 documents": {one: "2.5000"},
    }
    assert "Settings: data_hash abababab; max_new_tokens 8." in shown.notes


def test_groups_have_tables_of_their_own_with_what_was_read(folder):
    groups = {"recall": {"metrics": {"squad": "contains"}, "num_fewshot": 0}}
    short, long = {"context_length": 64, "bos": "empty"}, {"context_length": 2048, "bos": "empty"}
    for name, value in (("first", 0.5), ("second", 0.9)):
        path = make_workdir(folder / name)
        figures = {"arc": (value, 0.02, 100), "squad": (value, 0.03, 50)}
        settings = {"groups": groups, "context_length": 64}
        add_tasks(path, figures, text={"arc": short, "squad": long}, means={"recall": value}, **settings)
    shown = page_of(folder / "first", folder / "second")
    assert "Settings: num_fewshot none; limit 100; context_length 64; bos empty." in shown.notes
    assert "Settings: num_fewshot 0; limit 100; context_length 2048; bos empty." in shown.notes
    assert shown.cells(HARNESS) == {
        "arc acc, 100 documents": {"first step 6": "0.5000 ± 0.0200", "second step 6": "0.9000 ± 0.0200"},
    }
    assert shown.cells(f"{HARNESS}: recall") == {
        "squad acc, 50 documents": {"first step 6": "0.5000 ± 0.0300", "second step 6": "0.9000 ± 0.0300"},
        "mean of the group of each task's own": {"first step 6": "0.5000", "second step 6": "0.9000"},
    }


def test_speed_and_caches(folder):
    first = make_workdir(folder / "first")
    second = make_workdir(folder / "second", records=(training(1, 2.0),), model__dtype="bfloat16")
    shown = page_of(first, second)
    (speed,) = shown.cells(SPEED).values()
    assert speed == {
        "tokens/s": "1,250",
        "middle 80 %": "1,050 to 1,450",
        "MFU": "32.5 %",
        "devices": "not recorded",
        "batch, tokens": "128",
        # 6 P + 12 D (layers * keys), of which a token of 16 meets 8.5
        "FLOPs a token": f"{(6 * NUM_PARAMETERS + 12 * 16 * 2 * 8.5) / 1000:.1f} k",
        "records": "6",
    }
    assert "No speed in the log of second." in shown.notes
    # Two layers hold a key and a value of 16 channels for each token.
    caches = shown.cells(CACHES)
    assert list(caches) == ["1,024", "4,096", "16,384", "65,536", "262,144"]
    assert caches["262,144"] == {
        "first float32": f"{2 * 2 * 16 * 4:.1f} (64.0 MiB)",
        "second bfloat16": f"{2 * 2 * 16 * 2:.1f} (32.0 MiB)",
    }


def test_devices_are_those_of_the_newest_checkpoint(folder, monkeypatch):
    path = make_workdir(folder / "run")
    for step in (2, 6):
        (path / "checkpoints" / str(step)).mkdir(parents=True)
    read = {"2": {}, "6": {"devices": "8 x NVIDIA H100"}}
    monkeypatch.setattr(
        "rat_jax.report.run.Manifest.read", lambda folder: type("M", (), {"versions": read[folder.name]})
    )
    (speed,) = page_of(path).cells(SPEED).values()
    assert speed["devices"] == "8 x NVIDIA H100"


def test_configs_that_differ(folder):
    first = make_workdir(folder / "first")
    second = make_workdir(folder / "second", optimizer__learning_rate=0.5, model__pattern=("attention", "rat"))
    shown = page_of(first, second)
    (caption,) = (caption for caption in shown.tables if caption.startswith("Config fields that differ"))
    rows = shown.cells(caption)
    assert rows["optimizer.learning_rate"] == {"first": "0.01", "second": "0.5"}
    assert rows["model.pattern"] == {"first": "attention", "second": "attention, rat"}
    assert rows["model.rat.chunk_size"] == {"first": "–", "second": "4"}
    assert "model.width" not in rows
    same = int(re.search(r"; (\d+) are the same", caption)[1])
    alone = page_of(first)
    assert alone.cells("The config")["model.width"] == {"first": "16"}
    assert len(alone.cells("The config")) == same + len([row for row in rows.values() if row["first"] != "–"])
    assert "No field of the configs differs." in page_of(first, make_workdir(folder / "third")).notes


def test_a_damaged_log_gives_what_is_good_of_it(folder):
    lines = [json.dumps(record).encode() for record in RECORDS]
    lines[1:1] = [b"", b'{"step": 2, "lo', b"\xff\x00"]
    lines += [b'{"step": 7, "mean_loss": 1e300}', b'{"step": 8, "mean_loss": NaN}', b'{"step": 9, "mean_loss": "x"}']
    shown = page_of(make_workdir(folder / "run", log=b"\n".join(lines)))
    assert "run: log.jsonl: no record is in line 2, 3, 4; left out" in shown.notes
    assert shown.charts["Loss by step"].startswith("run, training: 3 at 1, 2.5 at 6;")


def test_one_run_with_nothing_measured(folder):
    path = make_workdir(folder / "run", records=(), saved_step=None)
    (path / "log.jsonl").unlink()
    shown = page_of(path)
    assert shown.headings == ["Run run", *SECTIONS]
    assert shown.cells(PROGRESS)[f"run {path}"]["state"] == "no step logged yet"
    assert shown.charts == {} and LOSSES not in shown.tables and SPEED not in shown.tables
    for note in (
        "No losses in the log of run.",
        "No evaluation of run: eval.py makes one.",
        "No scores of tasks in these workdirs.",
        "No speed in the log of run.",
    ):
        assert note in shown.notes


def test_an_imported_model(folder):
    path = make_workdir(folder / "run", records=(), saved_step=0)
    assert page_of(path).cells(PROGRESS)[f"run {path}"]["state"] == "a model alone, imported"


def test_a_config_that_cannot_be_read(folder):
    good, bad = make_workdir(folder / "good"), make_workdir(folder / "bad")
    values = json.loads((bad / "run.json").read_text())
    values["config"]["model"]["widht"] = 3
    (bad / "run.json").write_text(json.dumps(values))
    shown = page_of(good, bad)
    assert any(note.startswith("bad: its config cannot be read: config.model.widht is not") for note in shown.notes)
    assert shown.cells(PROGRESS)[f"bad {bad}"]["state"] == "step 6"
    assert shown.tables[CACHES][0] == ["context", "good float32"]
    assert "bad, training: 3 at 1, 2.5 at 6" in shown.charts["Loss by step"]
    assert "No config can be read." in page_of(bad).notes


def test_folders_of_one_name(folder):
    paths = [make_workdir(folder / place / "run") for place in ("a", "b")]
    shown = page_of(*paths)
    assert shown.headings[0] == "2 runs: a/run, b/run"
    assert "a/run, training: 3 at 1, 2.5 at 6; " in shown.charts["Loss by step"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Texts of 10 and 6 bytes, a token each and one for the end."""
    folder = tmp_path_factory.mktemp("texts")
    for name, text in (("train", "0123456789"), ("validation", "abcdef")):
        (folder / f"{name}.txt").write_text(text)
    settings = Settings(
        source=(str(folder / "train.txt"),),
        validation_source=(str(folder / "validation.txt"),),
        validation_fraction=0.01,
        tokenizer="bytes",
        eos_token=None,
        field="text",
        document_separator=None,
        invalid_utf8="refuse",
    )
    prepare(settings, folder / "corpus", num_workers=0, overwrite=False)
    return folder / "corpus"


class TestTokenizers:
    """Runs whose tokens are not the same."""

    def test_bits_a_byte_are_compared(self, folder, corpus):
        first = make_workdir(folder / "first", corpus=corpus)
        second = make_workdir(folder / "second", tokenizer=IdTokenizer(29, 0))
        add_evaluations(first, evaluation(16, 2.0, bits=1.0))
        add_evaluations(second, evaluation(16, 3.0, bits=1.25), evaluation(32, 3.0, bits=1.5))
        shown = page_of(first, second)
        warning = "The runs have different tokenizers"
        assert sum(note.startswith(warning) for note in shown.notes) == 2  # above all, and at the perplexities
        assert list(shown.charts) == [
            "Loss by step",
            "Loss by bytes of text",
            "Loss by step, tokenizer bytes, 257 ids",
            "Loss by tokens, tokenizer bytes, 257 ids",
            "Loss by step, tokenizer ids, 29 ids",
            "Loss by tokens, tokenizer ids, 29 ids",
            "Loss by position in bytes, longest context of each run",
        ]
        # A document of n bytes has n targets; 128 tokens a step are 128 * 10 / 11 bytes.
        begin, end = (f"{loss / math.log(2):.4g}" for loss in (3.0, 2.5))
        losses = f"first, training: {begin} at {128 * 10 / 11:.5g}, {end} at {6 * 128 * 10 / 11:.5g}"
        assert shown.charts["Loss by bytes of text"].startswith(losses)
        assert "Not in bits a byte, since the corpus is not there or its bytes are unknown: second." in shown.notes
        # A target of 2 nats at 1 bit a byte is of 2 / ln 2 bytes; one of 3 nats at 1.5 as well.
        width = 2 / math.log(2)
        positions = shown.charts["Loss by position in bytes, longest context of each run"]
        assert positions == (
            f"first, step 6, context 16 tokens: 1.5 at {2 * width:.5g}, 1 at {math.sqrt(13 * 16) * width:.5g}; "
            f"second, step 6, context 32 tokens: 2 at {2 * width:.5g}, 1.5 at {math.sqrt(13 * 32) * width:.5g}"
        )

    def test_two_of_one_kind_and_size_are_told_apart(self, folder):
        first, second = make_workdir(folder / "first"), make_workdir(folder / "second")
        info = Workdir(second).tokenizer / "tokenizer_info.json"
        info.write_text(json.dumps(json.loads(info.read_text()) | {"hash": "ab" * 32}))
        assert "Loss by step, tokenizer bytes, 257 ids, of second" in page_of(first, second).charts

    def test_an_unknown_one_may_be_another(self, folder):
        first, second = make_workdir(folder / "first"), make_workdir(folder / "second")
        Workdir(second).tokenizer.joinpath("tokenizer_info.json").write_text("{")
        shown = page_of(first, second)
        assert any(note.startswith("second: its tokenizer cannot be read: ") for note in shown.notes)
        assert any(note.startswith("The runs have different tokenizers") for note in shown.notes)
        assert "Loss by step, tokenizer unknown, 29 ids" in shown.charts
