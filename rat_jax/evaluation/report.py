"""Evaluations as a table and as a picture."""

import pathlib
from collections.abc import Sequence

from rat_jax.data.pipeline import describe_coverage
from rat_jax.evaluation.perplexity import Evaluation
from rat_jax.pictures import write_picture


def table(evaluations: Sequence[Evaluation]) -> str:
    """Text: what was measured, one line for each context length, the loss by position with a column for each."""
    lines = [f"loss on {coverage}" for coverage in dict.fromkeys(describe_coverage(e.fraction) for e in evaluations)]
    lines.append(f"{'context':>10} {'tokens':>13} {'loss':>8} {'perplexity':>11} {'bits/byte':>10}")
    for evaluation in evaluations:
        bits = "" if evaluation.bits_per_byte is None else f"{evaluation.bits_per_byte:.4f}"
        lines.append(
            f"{evaluation.context_length:>10} {evaluation.num_targets:>13,} {evaluation.loss:>8.4f} "
            f"{evaluation.perplexity:>11.3f} {bits:>10}"
        )
    longest = max(evaluations, key=lambda evaluation: evaluation.context_length)
    lines += ["", "loss (nats a token) at the positions of a context of"]
    lines.append(f"{'positions':>16}" + "".join(f"{evaluation.context_length:>10}" for evaluation in evaluations))
    # A shorter context's last bucket may end before the range does.
    by_first = [{bucket.first: bucket for bucket in evaluation.buckets()} for evaluation in evaluations]
    for bucket in longest.buckets():
        cells = [buckets.get(bucket.first) for buckets in by_first]
        losses = "".join(f"{'-' if cell is None or cell.loss is None else f'{cell.loss:.4f}':>10}" for cell in cells)
        lines.append(f"{bucket.first:>8} ..{bucket.last:>5}" + losses)
    return "\n".join(lines)


def plot(evaluations: Sequence[Evaluation], path: pathlib.Path, *, trained_length: int) -> None:
    """Draws the loss by position, a curve for each context length; a line marks the length of training sequences.

    Raises:
      FileError: if the picture cannot be written; what was at `path` is then as it was.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for evaluation in evaluations:
        buckets = [bucket for bucket in evaluation.buckets(per_octave=4) if bucket.loss is not None]
        axes.plot(
            [bucket.middle for bucket in buckets],
            [bucket.loss for bucket in buckets],
            "o-",
            markersize=3,
            label=f"context {evaluation.context_length}: perplexity {evaluation.perplexity:.3f}",
        )
    axes.axvline(trained_length, color="gray", linestyle="--", linewidth=1, label=f"trained on {trained_length}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("position in the context, tokens")
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    write_picture(figure, path)
