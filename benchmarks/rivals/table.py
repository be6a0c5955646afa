"""Tables of what the processes found."""

from collections.abc import Iterable

from benchmarks.printed_rows import Row
from benchmarks.rivals.task import MODULES, OURS, PASSES, Task

_COLUMNS = PASSES[::-1]


def key(row: Row) -> tuple[str, str, int]:
    """What a row is of: the rival, the layer or model, and T of a layer."""
    return row["rival"], row.get("layer", row.get("model")), row["tokens"] if "layer" in row else 0


def with_missing(task: Task, rows: Iterable[Row], why: dict[str, str]) -> list[Row]:
    """All rows of a task in order of the tables; where a process has printed none or not all of one, with the reason.

    Args:
      task: with the layers and models that were asked for.
      rows: that were printed.
      why: the rivals that were run, with what is to be said of a row that did not come.
    """
    found = {key(row): row for row in rows}
    wanted: list[Row] = []
    for tokens in task.lengths:
        for layer in task.layers:
            asked = [{"rival": rival, "layer": layer, "tokens": tokens} for rival in MODULES if rival in why]
            wanted += [row for row in asked if layer in task.offered(row["rival"]).layers]
    for rival in why:
        wanted += [{"rival": rival, "model": model} for model in task.offered(rival).models]
    reasons = [why[row["rival"]] for row in wanted]
    return [_whole(found.get(key(row), row), reason) for row, reason in zip(wanted, reasons, strict=True)]


def _whole(row: Row, why: str) -> Row:
    """A row that says why it has no times, or not all of them."""
    missing = [name for name in PASSES if f"{name}_ms" not in row]
    if "error" in row or not missing or ("model" in row and "tokens" in row):  # a model's is printed when it is done
        return row
    return row | {"error": f"{missing[0]} {why}" if len(missing) < len(PASSES) else why}


def times_ours(row: Row, ours: Row | None, name: str) -> str:
    """A rival's milliseconds a token over ours: above 1 ours is faster; nothing where there is no time of ours."""
    if ours is None or f"{name}_ms" not in ours or row["rival"] == OURS:
        return ""
    return f"{row[f'{name}_ms'] / row['rows'] / (ours[f'{name}_ms'] / ours['rows']):.2f}"


def layer_table(rows: list[Row]) -> str:
    """Train and prefill of every layer; a pass that did not run has "-", and the row says why."""
    lines = [
        f"{'T':>7} {'layer':<21} {'rival':<7} {'version':<8} {'rows':>4} {'train ms':>9} {'+-':>6} {'x ours':>6} "
        f"{'prefill':>9} {'+-':>6} {'x ours':>6} {'GB':>6}  what"
    ]
    found = {key(row): row for row in rows}
    for row in rows:
        if "layer" not in row:
            continue
        start = f"{row['tokens']:>7} {row['layer']:<21} {row['rival']:<7} {row.get('version', ''):<8}"
        if not any(f"{name}_ms" in row for name in _COLUMNS):
            lines.append(f"{start} {row['error']}")
            continue
        ours = found.get((OURS, row["layer"], row["tokens"]))
        parts = [
            f"{row[f'{name}_ms']:>9.2f} {row[f'{name}_spread_ms']:>6.2f} {times_ours(row, ours, name):>6}"
            if f"{name}_ms" in row
            else f"{'-':>9} {'':>6} {'':>6}"
            for name in _COLUMNS
        ]
        memory = f"{row['train_gb']:>6.1f}" if "train_gb" in row else f"{'':>6}"
        what = "; ".join(row[name] for name in ("how", "error") if name in row)
        lines.append(f"{start} {row['rows']:>4} {' '.join(parts)} {memory}  {what}")
    return "\n".join(lines)


def model_table(rows: list[Row]) -> str:
    """Training steps of every model."""
    lines = [
        f"{'model':<17} {'rival':<7} {'version':<8} {'T':>5} {'rows':>4} {'M':>7} {'ms a step':>9} {'tokens/s':>9}  how"
    ]
    for row in rows:
        if "model" not in row:
            continue
        start = f"{row['model']:<17} {row['rival']:<7} {row.get('version', ''):<8}"
        if "error" in row:
            lines.append(f"{start} {row['error']}")
            continue
        lines.append(
            f"{start} {row['tokens']:>5} {row['sequences']:>4} {row['parameters'] / 1e6:>7.1f} {row['step_ms']:>9.1f} "
            f"{row['tokens_per_s']:>9.0f}  {row['how']}"
        )
    return "\n".join(lines)
