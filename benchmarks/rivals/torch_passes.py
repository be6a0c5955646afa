"""Train and prefill of layers under PyTorch."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from benchmarks.printed_rows import Row, say
from benchmarks.rivals.task import PASSES, Task, note, reason, with_fewer
from benchmarks.timing import time_calls

DEVICE = "cuda"


class Layer(NamedTuple):
    """`apply(x)` for x [B, T, W], the tensors whose gradients are wanted besides x's, and in words what it is."""

    apply: Callable[[torch.Tensor], torch.Tensor]
    params: Sequence[torch.Tensor]
    how: str
    dtype: torch.dtype = torch.bfloat16  # of x


def say_rows(task: Task, make: Callable[[str, int, int], Layer], about: Row) -> None:
    """Prints the row of every layer at every length, first with prefill alone; arguments: `jax_passes.say_rows`."""
    for tokens in task.lengths:
        for name in task.layers:
            measure = functools.partial(_row, task, make, name, tokens, about)
            say(with_fewer(max(1, task.tokens // tokens), measure))


def _row(task: Task, make: Callable, name: str, tokens: int, about: Row, rows: int) -> Row:
    row: Row = about | {"layer": name, "tokens": tokens, "rows": rows}
    try:
        _measure(row, task, make)
    except Exception as error:  # another library's layer may raise any
        row["error"] = reason(error)
    torch.cuda.empty_cache()
    return row


def _measure(row: Row, task: Task, make: Callable) -> None:
    """Fills a row."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        layer = make(row["layer"], row["rows"], row["tokens"])
        x = torch.randn(row["rows"], row["tokens"], task.width, dtype=layer.dtype).requires_grad_()
        d_out = torch.randn_like(x)
    row["how"] = layer.how

    def train():
        return torch.autograd.grad(layer.apply(x), [x, *layer.params], d_out)

    def prefill():
        with torch.no_grad():
            return layer.apply(x)

    calls = {"prefill": prefill, "train": train}
    for name in PASSES:
        note(f"{row['layer']}, T {row['tokens']}, {row['rows']} rows: {name}")
        torch.cuda.reset_peak_memory_stats()
        times = time_calls(calls[name], lambda _: torch.cuda.synchronize(), task.repeats)
        row |= {f"{name}_ms": times.ms, f"{name}_spread_ms": times.spread_ms}
        row[f"{name}_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if name != PASSES[-1]:
            say(row)
