"""The two clocks: what fails or does not fit has a row that says so, and the others are timed."""

import jax.numpy as jnp
import pytest

from benchmarks.rivals import jax_passes
from benchmarks.rivals.task import NO_ROOM, Task, rows_in

TASK = Task(8, 8, 64, (16,), ("small", "large", "absent", "forward_only"), (), 3, True, None)
ABOUT = {"rival": "x", "version": "1"}


def check(rows, forward_error):
    found = {row["layer"]: row for row in rows}
    assert len(rows) == len(TASK.layers) and all(row["rival"] == "x" for row in rows)
    assert found["small"]["rows"] == 4 and found["small"]["how"] == "twice x"
    assert found["small"]["train_ms"] > 0 and found["small"]["prefill_ms"] > 0 and "error" not in found["small"]
    assert found["large"]["rows"] == 1 and found["large"]["train_ms"] > 0
    assert found["absent"]["error"] == "ImportError: no such layer" and found["absent"]["rows"] == 4
    assert forward_error in found["forward_only"]["error"] and "train_ms" not in found["forward_only"]


def make(layer, name, rows):
    if name == "absent":
        raise ImportError("no such layer")
    if name == "large" and rows > 1:
        raise RuntimeError("CUDA out of memory. Tried to allocate")
    return layer


def test_jax(capsys):
    def refuse(params, x):
        raise NotImplementedError("no backward pass")

    def make_layer(name, rows, tokens):
        apply = refuse if name == "forward_only" else lambda params, x: params * x
        return make(jax_passes.Layer(jnp.bfloat16(2), apply, "twice x"), name, rows)

    jax_passes.say_rows(TASK, make_layer, ABOUT)
    check(list(rows_in(capsys.readouterr().out)), "no backward pass")


@pytest.mark.slow
def test_torch(capsys, monkeypatch):
    torch = pytest.importorskip("torch")
    from benchmarks.rivals import torch_passes  # imports torch

    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10**9)
    monkeypatch.setattr(torch_passes, "DEVICE", "cpu")

    def make_layer(name, rows, tokens):
        factor = torch.tensor(2.0, requires_grad=True)
        params = [torch.zeros(1, requires_grad=True)] if name == "forward_only" else [factor]
        return make(torch_passes.Layer(lambda x: factor * x, params, "twice x"), name, rows)

    torch_passes.say_rows(TASK, make_layer, ABOUT)
    rows = list(rows_in(capsys.readouterr().out))
    check(rows, "not have been used")
    assert next(row for row in rows if row["layer"] == "forward_only")["prefill_ms"] > 0


def test_a_layer_that_fits_in_no_batch_says_so(capsys):
    def make_layer(name, rows, tokens):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    jax_passes.say_rows(TASK._replace(layers=("large",)), make_layer, ABOUT)
    (row,) = rows_in(capsys.readouterr().out)
    assert (row["rows"], row["error"]) == (1, NO_ROOM)


def test_a_copy_of_the_release_has_no_version(tmp_path):
    pytest.importorskip("torch")
    assert pytest.importorskip("benchmarks.rivals.release").version(str(tmp_path)) == ""
