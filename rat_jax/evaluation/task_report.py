"""Results of tasks as a table."""

from typing import Any


def table(results: dict[str, dict[str, Any]], *, header: bool) -> str:
    """Text: a line for each metric of each task, with its standard error."""
    lines = [f"{'task':<32} {'metric':<20} {'documents':>9} {'value':>9} {'stderr':>9}"] if header else []
    for name, values in results.items():
        if "error" in values:
            lines.append(f"{name:<32} failed: {values['error']}")
            continue
        for task, metrics in values["results"].items():
            count = values["n-samples"].get(task, {}).get("effective", "")
            for metric, value in metrics.items():
                label, _, of = metric.partition(",")
                if not of or label.endswith("_stderr"):
                    continue
                label = label if of == "none" else f"{label} ({of})"
                error = metrics.get(f"{metric.partition(',')[0]}_stderr,{of}")
                cells = [f"{x:.4f}" if isinstance(x, float) else str(x or "") for x in (value, error)]
                lines.append(f"{task:<32} {label:<20} {count:>9} {cells[0]:>9} {cells[1]:>9}")
        for task in values.get("without_examples", ()):
            lines.append(f"{task:<32} --num_fewshot has no effect: the task's file says 0")
        if count := values["num_left_out"]:
            lines.append(
                f"{name:<32} {count} {'document is' if count == 1 else 'documents are'} left out by the protocol"
            )
        if values["num_truncated"]:
            lines.append(f"{name:<32} {values['num_truncated']} contexts were too long and cut")
    return "\n".join(lines)
