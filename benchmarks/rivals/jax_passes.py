"""Train and prefill of layers under JAX; nothing is compiled while something is timed."""

import collections
import concurrent.futures
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import card
from benchmarks.printed_rows import Row, say
from benchmarks.rivals.task import NO_ROOM, PASSES, Task, note, reason, with_fewer

COMPILERS = 4  # at a time
SEQUENCES, SMALL_SEQUENCES = 8, 2  # of a model's step


class Layer(NamedTuple):
    """`apply(params, x)` for x [B, T, W] in bfloat16, and in words what it is."""

    params: Any
    apply: Callable[[Any, jax.Array], jax.Array]
    how: str


def train(apply: Callable[[Any, jax.Array], jax.Array], params: Any, x: jax.Array, d_out: jax.Array) -> Any:
    """The output and the gradients of parameters and input."""
    out, pull = jax.vjp(apply, params, x)
    return out, pull(d_out)


def say_rows(task: Task, make: Callable[[str, int, int], Layer], about: Row) -> None:
    """Prints the row of every layer at every length, first with prefill alone; smaller batches come last.

    Args:
      task: the layers and lengths.
      make: the layer of a name for a batch of rows of so many tokens.
      about: what is in every row: rival and version.
    """
    asked = collections.deque((tokens, max(1, task.tokens // tokens), task.layers) for tokens in task.lengths)
    while asked and task.layers:  # without any, no inputs are made either
        tokens, batch, names = asked.popleft()
        without_room = _say_batch(task, make, about, tokens, batch, names)
        if without_room:
            asked.append((tokens, batch // 2, without_room))


def say_models(task: Task, measure: Callable[[Task, str, int], Row], about: Row) -> None:
    """Prints the row of every model.

    Args:
      task: the models.
      measure: the row of the task's model of a name for so many sequences.
      about: as of `say_rows`.
    """
    for name in task.models:
        sequences = SMALL_SEQUENCES if task.small else SEQUENCES
        note(f"{name}: training steps")
        say(about | with_fewer(sequences, functools.partial(measure, task, name)))


def _say_batch(
    task: Task, make: Callable, about: Row, tokens: int, batch: int, names: tuple[str, ...]
) -> tuple[str, ...]:
    """Prints rows of one batch; returns the layers that a smaller one may have room for."""
    x, d_out = (
        jax.random.normal(key, (batch, tokens, task.width), jnp.bfloat16) for key in jax.random.split(jax.random.key(1))
    )
    arguments = {"prefill": (x,), "train": (x, d_out)}
    rows = {name: about | {"layer": name, "tokens": tokens, "rows": batch} for name in names}
    layers: dict[str, Layer] = {}
    for part in PASSES:
        left = [name for name in names if "error" not in rows[name]]
        for first in range(0, len(left), COMPILERS):
            group = left[first : first + COMPILERS]
            programs = _compile(part, {name: rows[name] for name in group}, layers, make, x)
            for name in group:
                _time(part, rows[name], layers.get(name), programs.get(name), arguments[part], task.repeats)
                if rows[name].get("error") != NO_ROOM or batch == 1:
                    say(rows[name])
    return tuple(name for name in names if rows[name].get("error") == NO_ROOM) if batch > 1 else ()


def _compile(part: str, rows: dict[str, Row], layers: dict, make: Callable, x: jax.Array) -> dict:
    """Futures of a pass of some layers, all of which are done; layers that are new are made."""
    programs = {}
    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as pool:
        for name, row in rows.items():
            what = f"{name}, T {row['tokens']}, {row['rows']} rows: {part}"
            note(what)
            try:
                if name not in layers:
                    layers[name] = make(name, row["rows"], row["tokens"])
                    row["how"] = layers[name].how
                params, apply, _ = layers[name]
                if part == "train":
                    lowered = jax.jit(functools.partial(train, apply)).lower(params, x, x)
                else:
                    lowered = jax.jit(apply).lower(params, x)
            except Exception as error:  # another library's layer may raise any
                row["error"] = reason(error)
            else:
                programs[name] = pool.submit(_compiled, lowered, what)
    return programs


def _compiled(lowered: jax.stages.Lowered, what: str) -> jax.stages.Compiled:
    start = time.perf_counter()
    compiled = lowered.compile()
    note(f"{what} compiled in {time.perf_counter() - start:.1f} s")
    return compiled


def _time(part: str, row: Row, layer: Layer | None, program: Any, arguments: tuple, repeats: int) -> None:
    """Adds a pass to a row that has no error yet."""
    if program is None:
        return
    try:
        compiled = program.result()
        times = card.time_compiled(compiled, (layer.params, *arguments), repeats)
        row |= {f"{part}_ms": times.ms, f"{part}_spread_ms": times.spread_ms}
        row[f"{part}_gb"] = card.held_gb(compiled)
    except Exception as error:  # as above
        row["error"] = reason(error)
