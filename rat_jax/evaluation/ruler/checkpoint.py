"""A checkpoint on RULER's tasks: printed, and written into its workdir as JSON and as a picture."""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax

from rat_jax.errors import RatJaxError, RunStopped
from rat_jax.evaluation import results as result_files
from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.ruler.evaluation import GROUP, RulerResults, run_ruler
from rat_jax.evaluation.ruler.examples import TASKS
from rat_jax.evaluation.ruler.heat_map import draw_heat_map, has_depths
from rat_jax.evaluation.ruler.measurement import Failure
from rat_jax.evaluation.ruler.table import table
from rat_jax.evaluation.subject import Subject
from rat_jax.files import FileError, write_json


def are_ruler_tasks(names: Sequence[str]) -> bool:
    """Whether names are of tasks that are generated here, not of those that the harness downloads data for.

    Raises:
      EvaluationError: if only some of them are.
    """
    ours = [name for name in names if name == GROUP or name in TASKS]
    if ours and len(ours) < len(names):
        raise EvaluationError(
            f"{', '.join(ours)} {'is' if len(ours) == 1 else 'are'} of RULER, the other tasks are not: measure them "
            f"with a command of their own"
        )
    return bool(ours)


def evaluate_checkpoint(
    subject: Subject,
    *,
    tasks: Sequence[str],
    print_json: bool,
    **settings: Any,
) -> None:
    """Runs the tasks; what is measured is written after each of them, and printed at the end.

    Args:
      subject: what is evaluated.
      tasks: names, as of `run_ruler`.
      print_json: instead of tables.
      **settings: of `run_ruler`.

    Raises:
      EvaluationError: if no task has a result; or as `run_ruler`.
      RunStopped: if some have none, or a file could not be written.
    """
    loaded = subject.loaded
    so_far: list[RulerResults] = []
    earlier: list[dict[str, Any]] = []  # of the same command

    def path() -> pathlib.Path:
        return result_files.tasks_path(subject.workdir.path, loaded.step, tasks, so_far[-1].measured, kind="ruler")

    def values() -> dict[str, Any]:
        return result_files.of_checkpoint(loaded) | so_far[-1].as_json()

    def keep(results: RulerResults) -> None:
        so_far.append(results)
        if jax.process_index() != 0:
            return
        result = results.results[-1]
        if isinstance(result, Failure):
            said = f"failed: {result.message}"
        else:
            said = f"{result.mean('string_match_all'):.1f} %"
        print(f"{result.task} at {result.context_length}: {said}", file=sys.stderr, flush=True)
        if len(so_far) == 1:
            earlier.extend(result_files.earlier_entries(path(), "results") or [])
        if results.measurements:
            write_json(path(), values() | {"results": _newest(earlier, values()["results"])})

    stopped = None
    try:
        run_ruler(loaded.model, subject.tokenizer(), tasks=tasks, on_result=keep, **settings)
    except (RatJaxError, KeyboardInterrupt) as error:
        if not so_far:
            raise
        stopped = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
    results = so_far[-1]
    print(json.dumps(values()) if print_json else table(results), flush=True)
    if stopped is not None:
        raise RunStopped(f"only the results above are there: {stopped}")
    if not results.measurements:
        raise EvaluationError("; ".join(failure.message for failure in results.failures))
    written = [path()]
    if has_depths(results) and jax.process_index() == 0:
        written.append(path().with_suffix(".png"))
        try:
            draw_heat_map(results, written[-1])
        except FileError as error:
            raise RunStopped(str(error)) from None
    print(f"written to {' and '.join(map(str, written))}", file=sys.stderr)
    if results.failures:
        raise RunStopped(f"{len(results.failures)} of {len(results.results)} measurements failed")


def _newest(earlier: list[dict[str, Any]], done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a command has done so far, and what an earlier one had of measurements that it has no result of."""

    def key(result: dict[str, Any]) -> tuple[str, int]:
        return result["task"], result["context_length"]

    results = {key(result): result for result in earlier if "error" not in result}
    for result in done:
        if "error" not in result or key(result) not in results:
            results[key(result)] = result
    return list(results.values())
