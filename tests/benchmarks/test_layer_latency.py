"""Rows of the PyTorch layers, which another process prints."""

import argparse
import json
import types

import pytest

from benchmarks import layer_latency

SIZES = {"tokens": 256, "width": 64, "heads": 4, "groups": 1, "chunk_size": 16, "repeats": 3}
ROW = {"tokens": 64, "layer": "torch:rat", "train_ms": 1.0}


@pytest.mark.parametrize("last", ['{"tokens": 64, "layer": "tor', '{"level": "warning"}', "{"])
def test_a_line_that_is_cut_short_or_no_row_costs_its_row_alone(monkeypatch, last):
    done = types.SimpleNamespace(stdout=f"{json.dumps(ROW)}\n{last}\n", stderr="starts\nout of memory\n")
    monkeypatch.setattr(layer_latency.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(layer_latency.subprocess, "run", lambda *arguments, **options: done)
    flags = argparse.Namespace(torch_lengths=[64], lengths=[64], torch_layers=["attention", "rat"], **SIZES)
    assert layer_latency.torch_rows(flags) == [
        {"tokens": 64, "layer": "torch:attention", "error": "out of memory"},
        ROW,
    ]
