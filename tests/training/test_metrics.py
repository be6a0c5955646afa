"""What a run writes down."""

import json
import pathlib
import struct
import sys
import types

import pytest

from rat_jax.checkpoints.run_log import read_log
from rat_jax.checkpoints.workdir import Workdir
from rat_jax.config import ConfigError
from rat_jax.training import metrics
from rat_jax.training.metrics import MetricLog, check_wandb, loss_figure
from tests.tiny_run import tiny_config

CONFIG = tiny_config("data")


@pytest.fixture
def workdir(tmp_path):
    workdir = Workdir(tmp_path / "run")
    workdir.mark(CONFIG, None)
    return workdir


def test_log_drops_steps_that_will_be_done_again_and_a_torn_line(workdir):
    said = []
    log = MetricLog(workdir, CONFIG, 0, said.append)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step})
    log.close()
    with workdir.log_file.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in read_log(workdir.log_file)] == [1, 2, 3]
    assert said == []
    log = MetricLog(workdir, CONFIG, 2, said.append)
    assert said == [f"{workdir.log_file}: no record is in line 4; moved to log.jsonl.bad"]
    log.write(3, {"loss": 0.25})
    log.write(3, {"validation_loss": 0.5})
    log.close()
    lines = [json.loads(line) for line in workdir.log_file.read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 0.25},
        {"step": 3, "validation_loss": 0.5},
    ]
    assert workdir.loss_curve.read_bytes().startswith(b"\x89PNG")
    assert any(workdir.tensorboard.iterdir())


def shown(workdir):
    """What TensorBoard shows: step, name and value of every event, without those that a later file purges."""
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    figures = []
    for file in sorted(workdir.tensorboard.iterdir()):
        content = file.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            assert struct.unpack("<I", content[8:12])[0] == masked_crc32c(content[:8])
            record, content = content[12 : 12 + size], content[12 + size :]
            assert struct.unpack("<I", content[:4])[0] == masked_crc32c(record)
            content = content[4:]
            event = event_pb2.Event.FromString(record)
            if event.session_log.status == event_pb2.SessionLog.START:
                figures = [figure for figure in figures if figure[0] < event.step]
            figures += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return figures


def test_tensorboard_has_every_step_of_the_log_at_every_moment(workdir):
    log = MetricLog(workdir, CONFIG, 0, pytest.fail)
    for step in (1, 2, 3):
        log.write(step, {"loss": step / 4, "tokens": step})
        logged = [(record["step"], name, record[name]) for record in read_log(workdir.log_file) for name in record]
        assert shown(workdir) == [figure for figure in logged if figure[1] != "step"]
    # It is killed here, and resumes from step 2.
    log = MetricLog(workdir, CONFIG, 2, pytest.fail)
    log.write(3, {"loss": 0.5})
    log.write(3, {"validation_loss": float("nan")})
    log.close()
    assert shown(workdir)[:-1] == [
        (1, "loss", 0.25),
        (1, "tokens", 1),
        (2, "loss", 0.5),
        (2, "tokens", 2),
        (3, "loss", 0.5),
    ]
    assert shown(workdir)[-1][:2] == (3, "validation_loss")
    assert read_log(workdir.log_file)[-1] == {"step": 3, "validation_loss": None}


class TestFailures:
    """A run goes on without what it does not need, and says so once."""

    @pytest.fixture
    def said(self):
        return []

    def go_on(self, log, workdir):
        for step in (1, 2, 3):
            log.write(step, {"loss": 1.0})
        log.close()
        assert [record["step"] for record in read_log(workdir.log_file)] == [1, 2, 3]

    def test_a_picture(self, workdir, said):
        workdir.loss_curve.mkdir()
        log = MetricLog(workdir, CONFIG, 0, said.append)
        log.write(1, {"loss": 1.0})
        log.plot()
        log.write(2, {"loss": 1.0})
        log.close()
        (line,) = said
        assert "loss_curve.png cannot be written: " in line and "Is a directory" in line and "goes on without" in line

    def test_tensorboard_from_the_start(self, workdir, said):
        workdir.tensorboard.write_text("in the way")
        self.go_on(MetricLog(workdir, CONFIG, 0, said.append), workdir)
        (line,) = said
        assert line.startswith("TensorBoard's file cannot be written: File exists")

    def test_tensorboard_later(self, workdir, said):
        log = MetricLog(workdir, CONFIG, 0, said.append)
        log._tensorboard.close()
        log._tensorboard._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        self.go_on(log, workdir)
        assert said == [
            "TensorBoard's file cannot be written: No space left on device; make room on its disk. The run goes on "
            "without"
        ]

    @pytest.mark.parametrize("moment", ["init", "log", "finish"])
    def test_wandb(self, tmp_path, said, monkeypatch, moment):
        class Error(Exception):
            pass

        def act(name):
            def call(*arguments, **settings):
                calls.append((name, settings))
                if name == moment:
                    raise Error("no\nnetwork")
                return wandb

            return call

        calls = []
        wandb = types.SimpleNamespace(Error=Error, **{name: act(name) for name in ("init", "log", "finish")})
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        config = tiny_config("data", training__wandb_project="rat")
        workdir = Workdir(tmp_path / "run")
        workdir.mark(config, None)
        self.go_on(MetricLog(workdir, config, 0, said.append), workdir)
        assert said == ["the run at Weights & Biases cannot be written: no network. The run goes on without"]
        name, settings = calls[0]
        assert (name, settings["project"], settings["id"]) == ("init", "rat", workdir.record().wandb_id)
        expected = {"init": 1, "log": 2, "finish": 5}
        assert len(calls) == expected[moment]


def test_the_curve_draws_means_and_has_the_name_of_the_run():
    records = [
        {"step": 1, "loss": 9.0},  # of a log without means
        {"step": 2, "loss": 8.0, "mean_loss": 4.0},
        {"step": 2, "validation_loss": 3.0},
        {"step": 3, "loss": 7.0, "mean_loss": None},
        {"step": 4, "loss": None, "mean_loss": None},
        {"step": 4, "validation_loss": None},
    ]
    (axes,) = loss_figure(records, title="my run").axes
    lines = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines]
    assert lines == [([1, 2], [9.0, 4.0]), ([2], [3.0])]
    assert axes.get_title() == "my run"


def test_the_name_of_a_run_is_that_of_its_folder(workdir, monkeypatch):
    drawn = []
    monkeypatch.setattr(metrics, "write_picture", lambda figure, path: drawn.append(figure))
    monkeypatch.chdir(workdir.path)
    log = MetricLog(Workdir(pathlib.Path(".")), CONFIG, 0, pytest.fail)
    log.write(1, {"loss": 1.0})
    log.close()
    assert [figure.axes[0].get_title() for figure in drawn] == ["run"]


def test_missing_wandb_is_an_error_at_the_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_wandb(tiny_config("data"))
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_wandb(tiny_config("data", training__wandb_project="rat"))
