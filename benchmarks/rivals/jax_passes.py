"""Train and prefill of layers under JAX, each compiled before anything is timed."""

import concurrent.futures
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import card
from benchmarks.rivals.task import NO_ROOM, Row, Task, reason, say, with_fewer

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
    """Prints the row of every layer at every length.

    Args:
      task: the layers and lengths.
      make: the layer of a name for a batch of rows of so many tokens.
      about: what is in every row: rival and version.
    """
    for tokens in task.lengths:
        batch, waiting = max(1, task.tokens // tokens), task.layers
        while waiting:
            rows = _rows(task, waiting, batch, tokens, make)
            waiting = tuple(row["layer"] for row in rows if row.get("error") == NO_ROOM and batch > 1)
            for row in rows:
                if row["layer"] not in waiting:
                    say(about | row)
            batch //= 2


def say_models(task: Task, measure: Callable[[Task, str, int], Row], about: Row) -> None:
    """Prints the row of every model.

    Args:
      task: the models.
      measure: the row of the task's model of a name for so many sequences.
      about: as of `say_rows`.
    """
    for name in task.models:
        sequences = SMALL_SEQUENCES if task.small else SEQUENCES
        say(about | with_fewer(sequences, functools.partial(measure, task, name)))


def _rows(task: Task, names: tuple[str, ...], batch: int, tokens: int, make: Callable) -> list[Row]:
    x, d_out = (
        jax.random.normal(key, (batch, tokens, task.width), jnp.bfloat16) for key in jax.random.split(jax.random.key(1))
    )
    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as pool:
        started = [_start(name, batch, tokens, make, x, pool) for name in names]
    return [_time(row, params, programs, x, d_out, task.repeats) for row, params, programs in started]


def _start(name: str, batch: int, tokens: int, make: Callable, x: jax.Array, pool) -> tuple[Row, Any, dict]:
    row: Row = {"layer": name, "tokens": tokens, "rows": batch}
    try:
        layer = make(name, batch, tokens)
        row["how"] = layer.how
        lowered = {
            "prefill": jax.jit(layer.apply).lower(layer.params, x),  # first: it stands where train cannot run
            "train": jax.jit(functools.partial(train, layer.apply)).lower(layer.params, x, x),
        }
    except Exception as error:  # another library's layer may raise any
        return row | {"error": reason(error)}, None, {}
    return row, layer.params, {name: pool.submit(program.compile) for name, program in lowered.items()}


def _time(row: Row, params: Any, programs: dict, x: jax.Array, d_out: jax.Array, repeats: int) -> Row:
    try:
        for name, program in programs.items():
            compiled = program.result()
            times = card.time_compiled(compiled, (params, x, d_out)[: 3 if name == "train" else 2], repeats)
            row |= {f"{name}_ms": times.ms, f"{name}_spread_ms": times.spread_ms}
            row[f"{name}_gb"] = card.held_gb(compiled)
    except Exception as error:  # as above
        row = row | {"error": reason(error)}
    return row
