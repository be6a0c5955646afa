"""RULER's scores as text."""

from collections.abc import Sequence

from rat_jax.evaluation.ruler.evaluation import RulerResults
from rat_jax.evaluation.ruler.measurement import Measurement
from rat_jax.evaluation.ruler.scoring import METRICS


def table(results: RulerResults) -> str:
    """What was measured, a table for each metric with a line for each task, and what failed."""
    measured = results.measured
    lines = [
        f"RULER, {measured['num_examples']} examples of the {measured['split']} split, greedy; prompts from "
        f"{measured['templates']}; words: {measured['words']}; essay: {measured['essay']}; BOS: "
        f"{'yes' if measured['bos'] else 'no'}"
    ]
    by_place = {(one.task, one.context_length): one for one in results.measurements}
    lengths = list(dict.fromkeys(length for _, length in by_place))
    measured_tasks = {task for task, _ in by_place}
    tasks = [task for task in dict.fromkeys(one.task for one in results.results) if task in measured_tasks]
    for metric in METRICS if by_place else ():
        lines += ["", f"{metric + ', %':<24}" + "".join(f"{length:>10}" for length in lengths)]
        for task in tasks:
            lines.append(f"{task:<24}" + _cells([by_place.get((task, length)) for length in lengths], metric))
        if len(tasks) > 1 and len(by_place) == len(tasks) * len(lengths):
            means = (sum(by_place[task, length].mean(metric) for task in tasks) / len(tasks) for length in lengths)
            lines.append(f"{'mean':<24}" + "".join(f"{mean:>10.1f}" for mean in means))
    if results.failures:
        lines.append("")
    lines += [f"{failure.task} at {failure.context_length} failed: {failure.message}" for failure in results.failures]
    return "\n".join(lines)


def _cells(measurements: Sequence[Measurement | None], metric: str) -> str:
    return "".join(f"{'-' if one is None else f'{one.mean(metric):.1f}':>10}" for one in measurements)
