"""The commands of the studies, from text to tables, with `--small`; and the losses that they measure."""

import json
import signal
import threading
import time

import numpy as np
import pytest
from flax import nnx

from benchmarks.evidence import gather, report, run_model, run_speeds, run_studies
from benchmarks.evidence.token_losses import token_losses
from rat_jax.checkpoints.model_workdir import save_model
from rat_jax.checkpoints.store import load_model
from rat_jax.config import MeshConfig
from rat_jax.data import prepare
from rat_jax.data.corpus import Corpus
from rat_jax.evaluation import perplexity
from rat_jax.model import LanguageModel
from rat_jax.sharding import make_mesh
from tests.benchmarks.evidence.example_results import result, write
from tests.tiny_run import make_corpus, tiny_config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Made by the commands of docs/evidence.md."""
    folder = tmp_path_factory.mktemp("evidence")
    assert gather.main(["--out", str(folder), "--small"]) == 0
    values = json.loads((folder / "gathered.json").read_text())
    assert [package["package"] for package in values["packages"]] == list(gather.SMALL)
    assert all(package["characters"] > 100_000 for package in values["packages"])
    source = ["--source", str(folder / "documents.jsonl.xz"), "--tokenizer=bpe:512", "--validation_fraction=0.02"]
    assert prepare.main([*source, "--out", str(folder / "corpus"), "--num_workers=0"]) == 0
    return folder / "corpus"


def test_models_are_trained_measured_and_reported(corpus, tmp_path, capsys):
    """A second call does nothing, and pictures are drawn of what there is."""
    command = ["--out", str(tmp_path), "--corpus", str(corpus), "--small", "--seeds=1", "--kinds", "attention"]
    assert run_studies.main(command) == 0
    said = capsys.readouterr().out
    assert "1 models, 0 of them measured before" in said and "attention-0: loss " in said
    values = json.loads((tmp_path / "results" / "attention-0.json").read_text())
    split = Corpus.open(corpus).splits["validation"]
    assert list(values["lengths"]) == ["64", "128", "256", "512"]
    assert sum(values["document_targets"]) == split.num_targets
    assert len(values["document_targets"]) == split.num_documents
    assert values["training_tokens"] == 8 * 4 * 64 and values["parameters"] < 100_000
    for length in values["lengths"].values():
        assert 4 < length["loss"] < 7
        assert sum(length["document_losses"]) / split.num_targets == pytest.approx(length["loss"], abs=1e-4)
    assert not (tmp_path / "runs" / "attention-0").exists()  # the parameters
    assert run_studies.main(command) == 0
    assert "1 models, 1 of them measured before" in capsys.readouterr().out
    assert report.main([str(tmp_path)]) == 0
    assert "| attention | 0.05 M | 1 | " in (untimed := capsys.readouterr().out)
    command = ["--out", str(tmp_path), "--small", "--steps=2", "--kinds", "attention"]
    assert run_speeds.main(command) == 0
    speed = json.loads((tmp_path / "speeds" / "attention.json").read_text())["tokens_per_second"]
    assert f"attention: {4 * 64 / speed * 1e3:.1f} ms a step, {speed:,.0f} tokens/s" in capsys.readouterr().out
    assert run_speeds.main(command) == 0
    assert capsys.readouterr().out == ""  # it is not done again
    assert report.main([str(tmp_path)]) == 0
    assert f" | {speed:,.0f} |" in capsys.readouterr().out and f" | {speed:,.0f} |" not in untimed
    for name in report.PICTURES:
        assert (tmp_path / name).stat().st_size > 10_000


def test_losses_of_tokens_are_those_of_eval(tmp_path):
    corpus = make_corpus(tmp_path, vocab_size=30)
    config = tiny_config(corpus, model__vocab_size=30)
    tokenizer = Corpus.open(corpus).tokenizer()
    save_model(tmp_path / "run", config, LanguageModel(config.model, rngs=nnx.Rngs(0)), step=1, tokenizer=tokenizer)
    loaded, mesh = load_model(tmp_path / "run"), make_mesh(MeshConfig())
    for length in (16, 40):
        found = token_losses(loaded, Corpus.open(corpus), length, batch_tokens=100)
        wanted = perplexity.evaluate(
            load_model(tmp_path / "run", mesh=mesh),
            Corpus.open(corpus),
            mesh,
            length,
            batch_tokens=80,
            max_batches=None,
        )
        assert found.losses.size == wanted.num_targets
        assert found.mean() == pytest.approx(wanted.loss, rel=1e-5)
        sums, targets = found.by_document()
        assert sums.sum() == pytest.approx(found.losses.sum())
        assert targets.size == Corpus.open(corpus).splits["validation"].num_documents
        of_octaves = {bucket.first: bucket.loss for bucket in wanted.buckets()}
        for first, loss in found.by_octave():
            assert loss == pytest.approx(of_octaves[first], rel=1e-5)
        assert np.array_equal(found.positions < 16, np.isin(found.positions, range(16)))


def test_a_model_that_fails_is_a_result(corpus, tmp_path, monkeypatch, capsys):
    def train(config, workdir):
        workdir.mkdir(parents=True)
        raise run_model.RunStopped("the loss is not finite\nand more")

    monkeypatch.setattr(run_model, "train", train)
    flags = ["rat", "--seed=3", "--out", str(tmp_path), "--corpus", str(corpus), "--small"]
    assert run_model.main(flags) == 1
    values = json.loads((tmp_path / "results" / "rat-3.json").read_text())
    assert (values["kind"], values["seed"], values["failed"]) == ("rat", 3, "the loss is not finite")
    assert "rat-3: the loss is not finite" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"12.0 s", b"nan", b"\xff"])
def test_damaged_seconds_are_named_before_the_training(corpus, tmp_path, monkeypatch, capsys, content):
    monkeypatch.setattr(run_model, "train", lambda config, workdir: pytest.fail("trained"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "rat-0.seconds").write_bytes(content)
    assert run_model.main(["rat", "--out", str(tmp_path), "--corpus", str(corpus), "--small"]) == 2
    assert "rat-0.seconds is damaged: it holds no seconds; delete it" in capsys.readouterr().err


def test_a_split_that_no_model_can_be_measured_on_is_refused_before_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_model, "train", lambda config, workdir: pytest.fail("trained"))
    (tmp_path / "text.txt").write_text("a few words " * 40)
    flags = ["--source", str(tmp_path / "text.txt"), "--tokenizer=bytes", "--validation_fraction=0.1"]
    assert prepare.main([*flags, "--out", str(tmp_path / "corpus"), "--num_workers=0"]) == 0
    flags = ["rat", "--out", str(tmp_path / "out"), "--corpus", str(tmp_path / "corpus"), "--small"]
    assert run_model.main(flags) == 2
    assert "tokens, a model is measured on more than 64: prepare it with a larger" in capsys.readouterr().err


def test_a_damaged_speed_is_told_before_any_kind_is_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_speeds, "measure_training", lambda *arguments: pytest.fail("timed"))
    (tmp_path / "speeds").mkdir()
    (tmp_path / "speeds" / "rat.json").write_text('{"kind": "rat"}')
    assert run_speeds.main(["--out", str(tmp_path), "--small", "--kinds", "attention", "rat"]) == 2
    assert "rat.json is damaged: it has no tokens_per_second; delete it and give" in capsys.readouterr().err


def test_seconds_are_those_of_all_sittings(corpus, tmp_path, monkeypatch):
    class Stopped:
        finished = False

    clock = iter([0.0, 5.0, 100.0, 107.0])
    monkeypatch.setattr(run_model.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(
        run_model, "train", lambda config, workdir: workdir.mkdir(parents=True, exist_ok=True) or Stopped
    )
    flags = ["rat", "--out", str(tmp_path), "--corpus", str(corpus), "--small"]
    assert run_model.main(flags) == 75
    assert not (tmp_path / "results" / "rat-0.json").exists()
    monkeypatch.setattr(Stopped, "finished", True)
    monkeypatch.setattr(run_model, "measure", lambda workdir: {})
    assert run_model.main(flags) == 0
    assert json.loads((tmp_path / "results" / "rat-0.json").read_text())["seconds"] == 12.0
    assert list((tmp_path / "runs").iterdir()) == []


class TestSittings:
    """What starts models, with a stand-in for them."""

    @pytest.fixture
    def started(self, tmp_path, monkeypatch):
        calls = []
        (tmp_path / "corpus").mkdir()

        class Process:
            def __init__(self, command, *, stdout, stderr, env):
                self.kind, self.seed = command[3], int(command[4].removeprefix("--seed="))
                calls.append((self.kind, self.seed, env.get("CUDA_VISIBLE_DEVICES")))

            def wait(process):
                self.clock += 100
                kind, seed = process.kind, process.seed
                if kind == "rnn":
                    return 1
                write(tmp_path / "out", result(kind, seed, 3.0))
                return 0

        self.clock = 0.0
        monkeypatch.setattr(run_studies.subprocess, "Popen", Process)
        monkeypatch.setattr(run_studies.time, "monotonic", lambda: self.clock)
        self.flags = ["--out", str(tmp_path / "out"), "--corpus", str(tmp_path / "corpus")]
        return calls

    def test_no_model_is_begun_that_would_not_end_in_time(self, started, capsys):
        command = [*self.flags, "--minutes=6", "--studies", "chunks", "--kinds", "rat_4", "rat_8", "rat", "rat_32"]
        assert run_studies.main([*command, "--seeds=1"]) == 75
        assert [kind for kind, _, _ in started] == ["rat_4", "rat_8", "rat"]
        assert run_studies.main([*command, "--seeds=1"]) == 0
        assert [kind for kind, _, _ in started] == ["rat_4", "rat_8", "rat", "rat_32"]

    def test_one_that_ends_without_a_result_does_not_stop_the_others(self, started, capsys):
        assert run_studies.main([*self.flags, "--kinds", "rnn", "rat"]) == 1
        assert [(kind, seed) for kind, seed, _ in started] == [("rnn", 0), ("rat", 0), ("rnn", 1), ("rat", 1)]
        said = capsys.readouterr()
        assert "rnn-0: no result, exit code 1: see " in said.out
        assert "error: without a result or failed: rnn-0, rnn-1" in said.err

    def test_one_with_a_damaged_result_does_not_stop_the_others(self, started, tmp_path, monkeypatch, capsys):
        end = run_studies.subprocess.Popen.wait

        def wait(process):
            code = end(process)
            if process.kind == "rat":
                (tmp_path / "out" / "results" / "rat-0.json").write_text("{")
            return code

        monkeypatch.setattr(run_studies.subprocess.Popen, "wait", wait)
        assert run_studies.main([*self.flags, "--seeds=1", "--kinds", "rat", "rat_4"]) == 1
        assert [kind for kind, _, _ in started] == ["rat", "rat_4"]
        said = capsys.readouterr()
        assert "rat_4-0: loss 3.0000 at 16 tokens" in said.out and "rat-0.json is damaged: " in said.out
        assert "error: without a result or failed: rat-0" in said.err

    def test_a_damaged_result_is_told_before_any_model_is_begun(self, started, tmp_path, capsys):
        write(tmp_path / "out", {"kind": "rat", "seed": 1})
        assert run_studies.main([*self.flags, "--kinds", "rnn", "rat"]) == 2
        assert "rat-1.json is damaged: it has no " in capsys.readouterr().err
        assert started == []

    def test_each_card_has_a_model(self, started):
        run_studies.main([*self.flags, "--gpus=2", "--studies=chunks"])
        assert {card for _, _, card in started} <= {"0", "1"}
        assert len({(kind, seed) for kind, seed, _ in started}) == len(started) == 16

    def test_a_card_may_have_several_models(self, started, monkeypatch):
        together = threading.Barrier(4)
        end = run_studies.subprocess.Popen.wait

        def wait(process):
            together.wait(timeout=60)  # until four are under way
            return end(process)

        monkeypatch.setattr(run_studies.subprocess.Popen, "wait", wait)
        command = ["--gpus=2", "--models_per_gpu=2", "--kinds", "rat", "rat_4", "--studies=chunks"]
        assert run_studies.main([*self.flags, *command]) == 0
        assert sorted(card for _, _, card in started) == ["0", "0", "1", "1"]

    def test_a_signal_begins_no_further_model_and_ends_those_under_way(self, started, monkeypatch, capsys):
        told = []

        def interrupted(process):
            if told:
                return 75
            told.append("wait")
            time.sleep(0.2)  # until the main thread waits
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
            while len(told) < 2:
                time.sleep(0.01)
            return 75

        monkeypatch.setattr(run_studies.subprocess.Popen, "wait", interrupted)
        monkeypatch.setattr(
            run_studies.subprocess.Popen, "terminate", lambda process: told.append("end"), raising=False
        )
        assert run_studies.main([*self.flags, "--kinds", "rat", "rat_4"]) == 75
        assert told == ["wait", "end"] and len(started) == 1
        said = capsys.readouterr()
        assert "rat-0: interrupted" in said.out and "nothing is lost" in said.err

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--seeds=0"], "--seeds must be above 0, got 0"),
            (["--minutes=-1"], "--minutes must be above 0"),
            (["--models_per_gpu=0"], "--models_per_gpu must be above 0"),
            (["--corpus=nowhere"], "there is no corpus "),
            (["--kinds", "lstm"], "invalid choice: 'lstm'"),
        ],
    )
    def test_what_does_not_fit(self, started, capsys, flags, message):
        assert run_studies.main([*self.flags, *flags]) == 2
        assert message in capsys.readouterr().err
        assert started == []
