"""The recall study's program: what it counts as right, the picture, and the command as the docs print it."""

import datetime
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks import recall
from configs import recall as recall_config
from rat_jax.checkpoints.model_workdir import save_model
from rat_jax.checkpoints.store import LoadedModel
from rat_jax.config import config_from_dict
from rat_jax.data.corpus import Corpus
from rat_jax.data.prepare import Settings, prepare
from rat_jax.data.recall import END, VOCAB_SIZE
from rat_jax.model import LanguageModel
from tests.tiny_run import make_corpus, tiny_config

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    settings = Settings(
        source=("recall:60",),
        validation_source=(),
        validation_fraction=0.2,
        tokenizer=f"ids:{VOCAB_SIZE}:{END}",
        eos_token=None,
        field="text",
        document_separator=None,
        invalid_utf8="refuse",
    )
    return prepare(settings, tmp_path_factory.mktemp("recall") / "corpus", num_workers=0, overwrite=False)


def make_config(corpus, pattern):
    values = recall_config.get_config("rnn")
    values.data.path = str(corpus.path)
    values.model.pattern = pattern
    return config_from_dict(values)


@pytest.fixture(scope="module")
def workdirs(corpus, tmp_path_factory):
    """Two runs, one of them of two mixers."""
    folder = tmp_path_factory.mktemp("runs")
    for name, pattern in (("recall_rnn", ("rnn",)), ("recall_both", ("rnn", "local_attention"))):
        config = make_config(corpus, pattern)
        model = LanguageModel(config.model, rngs=nnx.Rngs(0))
        save_model(folder / name, config, model, step=7, tokenizer=corpus.tokenizer())
    return folder


def test_right_answers_are_counted_apart(corpus, monkeypatch):
    """A model that answers with the value of the pair at hand in the near queries, and with one value in the others."""
    config = make_config(corpus, ("rnn",))
    model = LanguageModel(config.model, rngs=nnx.Rngs(0))

    def logits(self, tokens):
        keys = (tokens[:, :8] - 2) // 4
        match = (tokens[:, :, None] - 34) == keys[:, None, :]  # [B, T, 8]: the pair that a token asks for
        values = jnp.sum(match * ((tokens[:, :8] - 2) % 4)[:, None, :], axis=-1)
        is_near = (jnp.arange(tokens.shape[1]) < 40)[None]
        return jnp.where(is_near, 42 + values, 45)[..., None] == jnp.arange(VOCAB_SIZE)[None, None]

    monkeypatch.setattr(LanguageModel, "__call__", logits)
    row = recall.measure(LoadedModel(config, model, step=3, path=corpus.path))
    file = corpus.token_file("validation")
    documents = file.read(0, len(file)).reshape(-1, 81)
    far = documents[:, 73:81:2]
    assert row == recall.Row("rnn", 3, "float32", 100.0, pytest.approx(100 * (far == 45).mean()))
    assert 0 < row.far < 100


@pytest.mark.slow  # tests/test_docs.py runs it up to its work, the tests above do the work
def test_the_documented_command(workdirs, tmp_path):
    """From another folder; all mixers of the runs, and a picture beside them."""
    command = [sys.executable, ROOT / "docs/draw_recall.py", workdirs / "recall_both", workdirs / "recall_rnn"]
    tracked = (ROOT / "docs/recall.png").read_bytes()
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "| rnn, local_attention | 7 |" in done.stdout
    assert "| rnn | 7 |" in done.stdout
    assert f"cpu, float32, {datetime.date.today().isoformat()}; picture: {workdirs / 'recall.png'}" in done.stdout
    assert (workdirs / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert (ROOT / "docs/recall.png").read_bytes() == tracked
    assert not any(tmp_path.iterdir())


def test_the_picture_says_where_and_when():
    rows = [recall.Row("rat", 1000, "float32", 100.0, 90.0), recall.Row("rnn", 1000, "float32", 30.0, 40.0)]
    figure = recall.draw(rows, "a card, float32, a date")
    assert figure.get_supxlabel() == "a card, float32, a date"
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["rat", "rnn"]
    assert [bar.get_height() for bar in axes.patches] == [100.0, 30.0, 90.0, 40.0]


def test_a_model_of_another_task_is_refused(tmp_path, capsys):
    config = tiny_config(make_corpus(tmp_path), model__pattern=("rnn",))
    tokenizer = Corpus.open(config.data.path).tokenizer()
    save_model(tmp_path / "run", config, LanguageModel(config.model, rngs=nnx.Rngs(0)), step=1, tokenizer=tokenizer)
    assert recall.main([str(tmp_path / "run"), "--out", str(tmp_path / "recall.png")]) == 2
    assert "is no model of configs/recall.py" in capsys.readouterr().err
    assert not (tmp_path / "recall.png").exists()
