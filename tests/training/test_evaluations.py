"""Evaluations while training: they change nothing of the run, are in its log, and are done again after a kill."""

import contextlib
import json
import os
import signal
import types

import jax
import pytest

from rat_jax.checkpoints.store import load_model
from rat_jax.checkpoints.workdir import Workdir
from rat_jax.data.corpus import Corpus
from rat_jax.errors import RunStopped
from rat_jax.evaluation import EvaluationError
from rat_jax.evaluation.length_generalization import measure
from rat_jax.sharding import make_mesh
from rat_jax.training import TrainResult, run, train
from rat_jax.training.evaluations import Evaluations
from rat_jax.training.evaluators import PartFailedError
from rat_jax.training.monitor import TrainMonitor
from tests.stopped_run import Killed, assert_same_run, kill, tree
from tests.tiny_run import NUM_STEPS, tiny_config
from tests.training.test_metrics import shown


class Fake:
    """An evaluator without work."""

    def __init__(self, name="fake", every_steps=2, act=lambda step, check: None):
        self.name, self.every_steps, self.act = name, every_steps, act
        self.steps = []

    def run(self, params, step, check):
        self.act(step, check)
        self.steps.append(step)
        return {"figure": step / 2}


@pytest.fixture
def evaluators(monkeypatch):
    """Those of the runs to come."""
    made = []
    monkeypatch.setattr(run, "make_evaluators", lambda *arguments: made)
    return made


def figures(workdir, prefix):
    """Logged figures by step and name."""
    records = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    return [(r["step"], name, value) for r in records for name, value in r.items() if name.startswith(prefix)]


def test_a_run_is_the_same_with_evaluations_and_without(corpus, uninterrupted, tmp_path, capfd):
    lengths = {"every_steps": 4, "lengths": (40,), "max_batches": 1, "batch_tokens": 64}
    config = tiny_config(corpus, **{f"evaluation__length__{name}": value for name, value in lengths.items()})
    assert train(config, tmp_path / "run").finished
    assert_same_run(tmp_path / "run", uninterrupted)
    found = {(step, name): value for step, name, value in figures(tmp_path / "run", "length/")}
    names = ["length/loss_40", "length/loss_40_beyond", "length/secs"]
    assert sorted(found) == [(step, name) for step in (4, NUM_STEPS) for name in names]
    mesh = make_mesh(config.mesh)
    loaded = load_model(tmp_path / "run", mesh=mesh)
    expected = measure(loaded, Corpus.open(corpus), mesh, 40, batch_tokens=64, max_batches=1)
    assert found[NUM_STEPS, "length/loss_40"] == expected.loss
    assert found[NUM_STEPS, "length/loss_40_beyond"] == expected.loss_beyond != expected.loss
    in_tensorboard = {(step, name): value for step, name, value in shown(Workdir(tmp_path / "run"))}
    assert {key: in_tensorboard[key] for key in found} == pytest.approx(found)
    assert f"step 4: length evaluation: loss_40 {found[4, 'length/loss_40']:.4g}, " in capfd.readouterr().err


def test_no_evaluation_counts_against_the_time_of_steps(config, evaluators, monkeypatch, tmp_path):
    paused, real = [], TrainMonitor.pause

    @contextlib.contextmanager
    def pause(monitor, activity):
        with real(monitor, activity):
            paused.append(monitor._paused)
            yield
            paused.pop()

    def act(step, check):
        assert paused[-1:] == [True]

    monkeypatch.setattr(TrainMonitor, "pause", pause)
    evaluators.append(Fake(every_steps=1, act=act))
    train(config, tmp_path / "run")
    assert evaluators[0].steps == list(range(1, NUM_STEPS + 1))


def test_what_a_kill_cut_short_is_done_on_resume(config, uninterrupted, evaluators, tmp_path):
    evaluators += [Fake("one"), Fake("two", act=lambda step, check: step == 4 and kill())]
    with pytest.raises(Killed):
        train(config, tmp_path / "run")
    assert [evaluator.steps for evaluator in evaluators] == [[2, 4], [2]]
    evaluators[:] = [Fake("one"), Fake("two")]
    assert train(config, tmp_path / "run").finished
    assert [evaluator.steps for evaluator in evaluators] == [[6], [4, 6]]
    assert_same_run(tmp_path / "run", uninterrupted)
    for name in ("one", "two"):
        assert figures(tmp_path / "run", f"{name}/figure") == [(step, f"{name}/figure", step / 2) for step in (2, 4, 6)]


def test_a_signal_ends_an_evaluation_which_is_done_on_resume(config, uninterrupted, evaluators, tmp_path):
    def interrupt(step, check):
        check()
        if step == NUM_STEPS:
            os.kill(os.getpid(), signal.SIGTERM)
            check()

    evaluators.append(Fake(act=interrupt))
    assert train(config, tmp_path / "run") == TrainResult(NUM_STEPS, False, None)
    assert evaluators[0].steps == [2, 4]
    evaluators[:] = [Fake()]
    result = train(config, tmp_path / "run")
    assert result.finished and result.validation_loss is not None
    assert evaluators[0].steps == [NUM_STEPS]
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_finished_run_does_what_it_lacks_once(config, evaluators, finished_run):
    evaluators.append(Fake())
    assert train(config, finished_run).finished
    assert evaluators[0].steps == [NUM_STEPS]
    before = tree(finished_run)
    assert train(config, finished_run).finished
    assert evaluators[0].steps == [NUM_STEPS]
    assert tree(finished_run) == before


def fail(step, check):
    raise EvaluationError("no haystack\nof that name")


def test_a_failure_is_reported_and_the_run_goes_on(config, uninterrupted, evaluators, tmp_path, capfd):
    evaluators += [Fake(act=fail), Fake("other")]
    assert train(config, tmp_path / "run").finished
    assert_same_run(tmp_path / "run", uninterrupted)
    said = capfd.readouterr().err.splitlines()
    message = "the fake evaluation has no result: no haystack of that name. The run goes on"
    assert [line for line in said if "haystack" in line] == [f"step {step}: {message}" for step in (2, 4, 6)]
    assert figures(tmp_path / "run", "fake/") == [(step, "fake/failed", 1) for step in (2, 4, 6)]
    assert evaluators[1].steps == [2, 4, 6]
    train(config, tmp_path / "run")
    assert "haystack" not in capfd.readouterr().err  # what failed once is not tried at every start


def test_what_has_a_result_is_kept_where_a_part_has_none(config, evaluators, tmp_path, capfd):
    def fail_in_part(step, check):
        raise PartFailedError("no needle", {"found": step / 4})

    evaluators.append(Fake(every_steps=NUM_STEPS, act=fail_in_part))
    assert train(config, tmp_path / "run").finished
    assert f"step {NUM_STEPS}: the fake evaluation lacks results: no needle. The run goes on" in capfd.readouterr().err
    expected = [(NUM_STEPS, "fake/found", NUM_STEPS / 4), (NUM_STEPS, "fake/failed", 1)]
    assert figures(tmp_path / "run", "fake/") == expected


def test_a_failure_stops_a_run_that_says_so(corpus, evaluators, tmp_path):
    evaluators.append(Fake(every_steps=3, act=fail))
    message = "^step 3: the fake evaluation has no result: no haystack of that name; step 3 is saved, and the same"
    with pytest.raises(RunStopped, match=message):
        train(tiny_config(corpus, evaluation__on_failure="stop"), tmp_path / "run")
    assert load_model(tmp_path / "run").step == 3


def test_a_failure_of_one_host_of_several_is_not_passed_over(config, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    evaluations = Evaluations(config, [Fake(act=fail)], make_mesh(config.mesh), 0, ())
    monitor = types.SimpleNamespace(pause=contextlib.nullcontext, evaluation=lambda *said: pytest.fail("it went on"))
    with pytest.raises(EvaluationError, match="step 2: the fake evaluation has no result: no haystack"):
        evaluations.run(None, 2, monitor, types.SimpleNamespace(requested=False))


def test_lengths_that_the_split_does_not_have_are_refused_before_anything_is_written(corpus, tmp_path):
    config = tiny_config(corpus, evaluation__length__every_steps=2, evaluation__length__lengths=(8, 10**6))
    with pytest.raises(EvaluationError, match="context length 1,000,000 is longer than the validation split"):
        train(config, tmp_path / "run")
    assert not any(tmp_path.rglob("*.json*"))
