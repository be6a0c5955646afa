"""A run on several corpora: it resumes bit for bit, and tells the loss of each."""

import dataclasses
import json

import pytest

from rat_jax.checkpoints.store import load_model
from rat_jax.checkpoints.workdir import CheckpointError, Workdir
from rat_jax.data import DataError
from rat_jax.data_config import CorpusConfig
from rat_jax.evaluation import evaluate
from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.subject import Subject
from rat_jax.sampling.prompts import find_tokenizer
from rat_jax.sharding import make_mesh
from rat_jax.training import train
from tests.stopped_run import Killed, assert_same_run, kill, stop_at
from tests.tiny_run import make_corpus, tiny_config


@pytest.fixture(scope="module")
def paths(corpus, tmp_path_factory):
    return {"prose": str(corpus), "code": str(make_corpus(tmp_path_factory.mktemp("code"), num_ids=700))}


def mixed(paths, prose=3.0, **changes):
    corpora = {"prose": CorpusConfig(paths["prose"], prose), "code": CorpusConfig(paths["code"], 1.0)}
    config = tiny_config(paths["prose"], training__num_steps=6, **changes)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path="", corpora=corpora))


@pytest.fixture(scope="module")
def whole(paths, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("mixture") / "whole"
    assert train(mixed(paths), workdir).finished
    return workdir


def records(workdir, name):
    lines = (workdir / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if name in record]


def test_a_stopped_run_ends_like_one_that_was_not(paths, whole, tmp_path, monkeypatch):
    stop_at(monkeypatch, 4, kill)
    with pytest.raises(Killed):
        train(mixed(paths), tmp_path / "run")
    monkeypatch.undo()
    assert train(mixed(paths), tmp_path / "run").finished
    assert_same_run(tmp_path / "run", whole)
    names = ("validation_loss/code", "validation_loss/prose")
    for name in names:
        losses = [[record[name] for record in records(run, name)] for run in (whole, tmp_path / "run")]
        assert losses[0] == losses[1] and len(losses[0]) == 2


def test_the_validation_is_that_of_each_corpus_and_the_mean_by_their_weights(paths, whole, tmp_path, capfd):
    last = records(whole, "validation_loss")[-1]
    loss = (3 * last["validation_loss/prose"] + last["validation_loss/code"]) / 4
    assert last["validation_loss"] == pytest.approx(loss, rel=1e-12)
    assert last["validation_loss/prose"] != last["validation_loss/code"]
    assert last["validation_fraction/code"] == 1 > last["validation_fraction"] > last["validation_fraction/prose"]
    train(mixed(paths), whole)
    said = capfd.readouterr().err
    assert f"validation loss {loss:.4f} nats a token, on " in said and " of the validation splits" in said


def test_another_mixture_is_refused_and_another_place_is_not(paths, whole, tmp_path):
    with pytest.raises(DataError, match=r"corpora\.prose\.weight was 3\.0, is 2\.0"):
        train(mixed(paths, prose=2.0), whole)
    with pytest.raises(CheckpointError, match=r"seed is 0 there, 1 now"):
        train(mixed(paths, seed=1), whole)
    moved = make_corpus(tmp_path / "moved", num_ids=700)
    assert train(mixed(paths | {"code": str(moved)}), whole).finished


def test_what_reads_one_corpus_wants_its_name(paths, whole, tmp_path):
    mesh = make_mesh(mixed(paths).mesh)
    loaded = load_model(whole, mesh=mesh)
    subject = Subject(loaded, Workdir(whole), mesh, None)
    with pytest.raises(EvaluationError, match=rf"several corpora: name one with --data_path, as {paths['code']}, "):
        subject.corpus()
    corpus = dataclasses.replace(subject, data_path=paths["code"]).corpus()
    found = evaluate(loaded, corpus, mesh, 16, batch_tokens=8 * 16, max_batches=2)
    assert found.loss == pytest.approx(records(whole, "validation_loss")[-1]["validation_loss/code"], rel=1e-6)
    tokenizer = find_tokenizer(Workdir(tmp_path), loaded.config, None)  # where the workdir holds none
    assert tokenizer.hash == corpus.tokenizer_hash


@pytest.mark.slow  # of one corpus it is quick
def test_the_loss_in_other_lengths_is_that_of_each(paths, tmp_path):
    changes = {"evaluation__length__every_steps": 2, "evaluation__length__lengths": (8, 32)}
    config = dataclasses.replace(mixed(paths, **changes))
    train(dataclasses.replace(config, training=dataclasses.replace(config.training, num_steps=2)), tmp_path / "run")
    (record,) = records(tmp_path / "run", "length/secs")
    names = [f"length/loss_{length}/{name}" for length in (8, 32) for name in ("code", "prose")]
    assert {*names, "length/loss_32_beyond/code"} <= set(record)
