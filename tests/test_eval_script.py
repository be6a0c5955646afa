"""eval.py as a user runs it."""

import importlib.util
import json
import math

import pytest
from flax import nnx

from rat_jax.checkpoints.model_workdir import save_model
from rat_jax.data.corpus import Corpus
from rat_jax.evaluation import length_report, perplexity, report
from rat_jax.model import LanguageModel
from tests.commands import call_script, run_script
from tests.tiny_run import make_corpus, tiny_config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval_script")
    config = tiny_config(make_corpus(folder), model__pattern=("rnn",))
    model = LanguageModel(config.model, rngs=nnx.Rngs(0))
    save_model(folder / "run", config, model, step=7, tokenizer=Corpus.open(config.data.path).tokenizer())
    return folder / "run"


def results_of(folder) -> dict[str, dict]:
    return {file.name: json.loads(file.read_text()) for file in folder.glob("evaluation-*.json")}


def test_it_prints_and_writes_the_losses(workdir):
    done = run_script("eval.py", "--workdir", workdir, "--context_lengths=40,16", "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    (name,) = (name for name, values in results_of(workdir).items() if values == results)
    assert name.startswith("evaluation-7-corpus-16_40-")
    assert (workdir / name).with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert results["step"] == 7
    assert [evaluation["context_length"] for evaluation in results["evaluations"]] == [16, 40]
    corpus = Corpus.open(workdir.parent / "corpus")
    file, statistics = corpus.token_file("validation"), corpus.splits["validation"]
    ids = file.read(0, len(file))
    for evaluation in results["evaluations"]:
        assert evaluation["num_targets"] == len(ids) - 1 - (ids[:-1] == 0).sum() == statistics.num_targets
        assert 20 < evaluation["perplexity"] < 40  # a new model: the vocabulary has 29 ids
        assert evaluation["loss_by_position"][0]["first"] == 0
        nats = evaluation["loss"] * evaluation["num_targets"]
        assert evaluation["bits_per_byte"] == pytest.approx(nats / math.log(2) / statistics.num_bytes)


@pytest.fixture
def no_picture(monkeypatch):
    """Pictures take seconds."""
    monkeypatch.setattr(report, "plot", lambda evaluations, path, trained_length: None)
    monkeypatch.setattr(length_report, "plot", lambda runs, path: None)


@pytest.mark.usefixtures("no_picture")
def test_each_measurement_has_its_own_files(workdir, tmp_path, capsys):
    other = make_corpus(tmp_path, num_ids=1000)
    measurements = [
        ["--context_lengths=16"],
        ["--context_lengths=40"],
        ["--context_lengths=16", "--max_batches=1", "--batch_tokens=16"],
        ["--context_lengths=16", "--data_path", other],
    ]
    before = results_of(workdir)
    for number, arguments in enumerate(measurements, start=1):
        assert call_script("eval.py", "--workdir", workdir, *arguments) == 0
        assert len(results_of(workdir)) == len(before) + number
    assert before.items() <= (after := results_of(workdir)).items()
    assert call_script("eval.py", "--workdir", workdir, *measurements[0]) == 0
    assert results_of(workdir).keys() == after.keys()


@pytest.mark.usefixtures("no_picture")
def test_what_was_computed_is_printed_before_it_is_written(workdir, capsys):
    assert call_script("eval.py", "--workdir", workdir, "--context_lengths=16,40") == 0
    table = capsys.readouterr().out
    (file,) = workdir.glob("evaluation-7-corpus-16_40-*.json")
    file.unlink()
    file.mkdir()  # a place that cannot be written to, whoever runs the tests
    assert call_script("eval.py", "--workdir", workdir, "--context_lengths=16,40") == 1
    printed = capsys.readouterr()
    assert printed.out == table
    assert printed.err.splitlines()[-1].startswith(f"error: {file}")
    assert "cannot be written: " in printed.err
    file.rmdir()


@pytest.mark.usefixtures("no_picture")
def test_lengths_that_are_done_outlive_one_that_fails(workdir, monkeypatch, capsys):
    real = perplexity.evaluate

    def fail_at_40(loaded, corpus, mesh, context_length, **settings):
        if context_length == 40:
            raise perplexity.EvaluationError("the loss is not finite")
        return real(loaded, corpus, mesh, context_length, **settings)

    monkeypatch.setattr(perplexity, "evaluate", fail_at_40)
    assert call_script("eval.py", "--workdir", workdir, "--context_lengths=16,40") == 1
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()[2:3]] == ["16"]
    assert printed.err.endswith("error: only the context lengths above are done: the loss is not finite\n")


def test_contexts_longer_than_the_split_are_refused_before_any_is_computed(workdir, monkeypatch, capsys):
    monkeypatch.setattr(perplexity, "evaluate", None)
    assert call_script("eval.py", "--workdir", workdir, "--context_lengths=16,10000000") == 2
    assert "error: context length 10,000,000 is longer than the validation split" in capsys.readouterr().err


@pytest.mark.usefixtures("no_picture")
def test_length_generalization(workdir, capsys):
    flags = ["--workdir", workdir, "--length_generalization=4", "--max_batches=1", "--batch_tokens=64"]
    assert call_script("eval.py", *flags, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    (file,) = workdir.glob("length_generalization-7-corpus-64-*.json")
    assert json.loads(file.read_text()) == values
    assert [bucket["first"] for bucket in values["loss_by_octave"]] == [0, 16, 32]
    assert values["split_fraction"] < 1

    assert call_script("eval.py", "--workdir", workdir, "--length_generalization=0") == 2
    assert capsys.readouterr().err == "error: --length_generalization must be 1 or more, got 0\n"
    file.unlink()
    file.mkdir()
    assert call_script("eval.py", *flags) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("loss on ")
    assert printed.err.splitlines()[-1].startswith(f"error: {file}")
    file.rmdir()


def test_tasks_without_the_harness(workdir, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else real(name))
    assert call_script("eval.py", "--workdir", workdir, "--tasks=piqa") == 2
    assert capsys.readouterr().err.endswith(
        "error: --tasks needs the lm-evaluation-harness: pip install -r requirements-eval.txt\n"
    )


def test_errors_are_one_line(workdir, tmp_path, capsys):
    done = run_script("eval.py", "--workdir", tmp_path / "missing")
    assert (done.returncode, done.stderr) == (2, f"error: there is no workdir {tmp_path / 'missing'}\n")

    other = make_corpus(tmp_path, vocab_size=30)
    capsys.readouterr()
    for arguments, message in (
        (["--data_path", other], f"{other} was made by another tokenizer"),
        (["--context_lengths=16,x"], "--context_lengths wants numbers with commas between"),
        (["--step=1.5"], "flag --step=1.5"),
        (["--limit=5"], "--limit has no effect without --tasks"),
        (["--tasks=piqa", "--max_batches=5"], "--max_batches has no effect with --tasks"),
        (["--tasks=piqa", "--context_lengths=16,32"], "--tasks wants one context length, got 16, 32"),
        (["--tasks=piqa", "--length_generalization=2"], "--length_generalization and --tasks are different"),
        (["--length_generalization=2", "--context_lengths=16"], "--context_lengths has no effect with --length_gen"),
        (["--data_path=gs://bucket/corpus"], "--data_path is 'gs://bucket/corpus': gs:// is not read directly"),
    ):
        assert call_script("eval.py", "--workdir", workdir, *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}")
        assert error.count("\n") == 1
