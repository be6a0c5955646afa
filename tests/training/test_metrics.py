"""FLOP counts, and what a run writes down."""

import json
import sys
import types

import pytest

from rat_jax.checkpoints.workdir import Workdir
from rat_jax.config import ConfigError
from rat_jax.flops import flops_per_token, peak_flops
from rat_jax.training.metrics import MetricLog, check_wandb, loss_figure, read_log
from tests.tiny_run import tiny_config


def counted_keys(kind, seq_len):
    """Keys that a token sees, on average over a row, counted one by one: a window of 5, chunks of 4."""
    counts = {
        "attention": [t + 1 for t in range(seq_len)],
        "local_attention": [min(t, 5) + 1 for t in range(seq_len)],
        "rattention": [min(t, 5) + 1 + 2 * 8 for t in range(seq_len)],  # a state of 16 by 8, written and read
        "rat": [t // 4 + 1 for t in range(seq_len)],
        "rnn": [0] * seq_len,
    }[kind]
    return sum(counts) / seq_len


@pytest.mark.parametrize("kind", ["attention", "local_attention", "rat", "rattention", "rnn"])
@pytest.mark.parametrize("seq_len", [4, 16])
def test_flops(kind, seq_len):
    model = tiny_config("data", model__pattern=(kind,)).model
    expected = 6 * 1000 + 12 * 16 * 2 * counted_keys(kind, seq_len)
    assert flops_per_token(model, 1000, seq_len) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, flops):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == flops


def test_log_drops_steps_that_will_be_done_again_and_a_torn_line(tmp_path):
    workdir, config = Workdir(tmp_path), tiny_config("data")
    log = MetricLog(workdir, config, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step})
    log.close()
    with workdir.log_file.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in read_log(workdir.log_file)] == [1, 2, 3]
    log = MetricLog(workdir, config, 2)
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


def test_the_curve_draws_means_and_has_the_name_of_the_run():
    records = [
        {"step": 1, "loss": 9.0},  # of a log without means
        {"step": 2, "loss": 8.0, "mean_loss": 4.0},
        {"step": 2, "validation_loss": 3.0},
        {"step": 3, "loss": 7.0, "mean_loss": float("inf")},
    ]
    (axes,) = loss_figure(records, title="my run").axes
    lines = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines]
    assert lines == [([1, 2], [9.0, 4.0]), ([2], [3.0])]
    assert axes.get_title() == "my run"


def test_missing_wandb_is_an_error_at_the_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_wandb(tiny_config("data"))
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_wandb(tiny_config("data", training__wandb_project="rat"))
