"""The two clocks: what fails or does not fit has a row that says so, and the others are timed."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.printed_rows import rows_in
from benchmarks.rivals import jax_passes
from benchmarks.rivals.task import NO_ROOM, Task

TASK = Task(8, 8, 64, (16,), ("small", "large", "absent", "forward_only"), (), 3, True, None)
ABOUT = {"rival": "x", "version": "1"}


def check(rows, forward_error):
    found = {row["layer"]: row for row in rows}
    assert set(found) == set(TASK.layers) and all(row["rival"] == "x" for row in rows)
    part, whole = (row for row in rows if row["layer"] == "small")
    assert whole == found["small"] and part.items() < whole.items()  # the same prefill, said before train had begun
    assert part["prefill_ms"] > 0 and "train_ms" not in part
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
    captured = capsys.readouterr()
    check(list(rows_in(captured.out)), "no backward pass")
    notes = captured.err.splitlines()
    assert notes[0] == "@ small, T 16, 4 rows: prefill" and "@ large, T 16, 1 rows: train" in notes
    assert any(line.startswith("@ small, T 16, 4 rows: train compiled in ") for line in notes)


def test_prefill_comes_though_train_is_never_done(capsys, monkeypatch):
    class Cut(BaseException):
        pass

    def cut(apply, params, x, d_out):
        raise Cut

    monkeypatch.setattr(jax_passes, "train", cut)
    task = TASK._replace(layers=("a", "b"))
    with pytest.raises(Cut):
        jax_passes.say_rows(task, lambda *_: jax_passes.Layer(jnp.bfloat16(2), jnp.multiply, "twice x"), ABOUT)
    rows = list(rows_in(capsys.readouterr().out))
    assert [(row["layer"], row["prefill_ms"] > 0, "train_ms" in row) for row in rows] == [
        ("a", True, False),
        ("b", True, False),
    ]


def test_a_layer_whose_backward_pass_alone_fails_keeps_prefill(capsys):
    @jax.custom_vjp
    def forward_only(params, x):
        return params * x

    def refuse(*_):
        raise NotImplementedError("no backward pass")

    forward_only.defvjp(refuse, refuse)
    task = TASK._replace(layers=("a",))
    jax_passes.say_rows(task, lambda *_: jax_passes.Layer(jnp.bfloat16(2), forward_only, "twice x"), ABOUT)
    row = list(rows_in(capsys.readouterr().out))[-1]
    assert row["prefill_ms"] > 0 and row["error"] == "NotImplementedError: no backward pass"


def test_smaller_batches_come_after_all_lengths(capsys):
    def make_layer(name, rows, tokens):
        return make(jax_passes.Layer(jnp.bfloat16(2), jnp.multiply, "twice x"), name, rows)

    jax_passes.say_rows(TASK._replace(layers=("small", "large"), lengths=(16, 32)), make_layer, ABOUT)
    rows = list(rows_in(capsys.readouterr().out))
    said = [(row["layer"], row["tokens"], row["rows"]) for row in rows if "train_ms" in row]
    assert said == [("small", 16, 4), ("small", 32, 2), ("large", 32, 1), ("large", 16, 1)]


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


def test_without_layers_no_inputs_are_made(monkeypatch):
    def refuse(*_):
        raise AssertionError("inputs are made")

    monkeypatch.setattr(jax.random, "normal", refuse)
    jax_passes.say_rows(TASK._replace(layers=()), make, ABOUT)


def test_a_copy_of_the_release_has_no_version(tmp_path):
    pytest.importorskip("torch")
    assert pytest.importorskip("benchmarks.rivals.release").version(str(tmp_path)) == ""


def test_pytorch_takes_the_mask_of_the_release():
    torch = pytest.importorskip("torch")
    from torch.nn.attention import flex_attention

    from benchmarks.rivals.release import CHUNK_SIZE, earlier_chunks

    mask = flex_attention.create_block_mask(earlier_chunks, 1, 1, 4 * CHUNK_SIZE, 4, device="cpu")
    seen = flex_attention.create_mask(mask.mask_mod, 1, 1, 4 * CHUNK_SIZE, 4, device="cpu")[0, 0]
    expected = [[chunk < token // CHUNK_SIZE for chunk in range(4)] for token in range(4 * CHUNK_SIZE)]
    assert torch.equal(seen, torch.tensor(expected))
