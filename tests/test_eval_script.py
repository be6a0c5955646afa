"""eval.py as a user runs it."""

import json

import pytest
from flax import nnx

from rat_jax.checkpoints.store import save_model
from rat_jax.data.corpus import Corpus
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


def test_it_prints_and_writes_the_losses(workdir):
    done = run_script("eval.py", "--workdir", workdir, "--context_lengths=40,16", "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results == json.loads((workdir / "evaluation-7.json").read_text())
    assert (workdir / "evaluation-7.png").read_bytes().startswith(b"\x89PNG")
    assert results["step"] == 7
    assert [evaluation["context_length"] for evaluation in results["evaluations"]] == [16, 40]
    ids = Corpus.open(workdir.parent / "corpus").token_file("validation").tokens
    for evaluation in results["evaluations"]:
        assert evaluation["num_targets"] == len(ids) - 1 - (ids[:-1] == 0).sum()
        assert 20 < evaluation["perplexity"] < 40  # a new model: the vocabulary has 29 ids
        assert evaluation["loss_by_position"][0]["first"] == 0


def test_errors_are_one_line(workdir, tmp_path, capsys):
    done = run_script("eval.py", "--workdir", tmp_path / "missing")
    assert (done.returncode, done.stderr) == (2, f"error: there is no workdir {tmp_path / 'missing'}\n")

    other = make_corpus(tmp_path, vocab_size=30)
    capsys.readouterr()
    assert call_script("eval.py", "--workdir", workdir, "--data_path", other) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {other} was made by another tokenizer")
    assert error.count("\n") == 1
