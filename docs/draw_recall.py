"""Accuracy of trained models on the recall task, near and far queries apart: a table, and docs/recall.png.

  python docs/draw_recall.py runs/recall_*

The task is that of `rat_jax/data/recall.py`, the models those of `configs/recall.py`. A model's answer is its likeliest
token after a queried key, in documents of the validation split.
"""

import argparse
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rat_jax.checkpoints.store import LoadedModel, load_model
from rat_jax.data.pipeline import ValidationData
from rat_jax.data.recall import FAR_QUERIES, NEAR_QUERIES, NUM_VALUES

KINDS = {"near": "1 to 14 tokens back", "far": "65 to 78 tokens back"}


def accuracies(loaded: LoadedModel) -> tuple[float, float]:
    """Right answers in percent, of the near and of the far queries of the validation split."""
    graphdef, params = nnx.split(loaded.model)
    predict: Callable = jax.jit(lambda params, tokens: jnp.argmax(nnx.merge(graphdef, params)(tokens), axis=-1))
    queries = [*NEAR_QUERIES, *FAR_QUERIES]
    right = []
    for batch in ValidationData(loaded.config.data, vocab_size=loaded.config.model.vocab_size):
        rows = batch.loss_weights[:, queries].all(axis=1)  # the last batch may hold rows of padding
        found = np.asarray(predict(params, batch.tokens))
        right.append((found == batch.targets)[:, queries][rows])
    of_query = 100 * np.concatenate(right).mean(axis=0)
    return of_query[: len(NEAR_QUERIES)].mean(), of_query[len(NEAR_QUERIES) :].mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).with_name("recall.png"))
    arguments = parser.parse_args()
    print("| mixer | steps | " + " | ".join(f"{kind} queries ({what})" for kind, what in KINDS.items()) + " |")
    print("|---|---|---|---|")
    found = {}
    for workdir in arguments.workdirs:
        loaded = load_model(workdir)
        (mixer,) = loaded.config.model.pattern
        found[mixer] = accuracies(loaded)
        print(f"| {mixer} | {loaded.step} | " + " | ".join(f"{percent:.1f} %" for percent in found[mixer]) + " |")
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for offset, color, (kind, what), heights in zip(
        (-0.2, 0.2), ("tab:gray", "tab:blue"), KINDS.items(), zip(*found.values(), strict=True), strict=True
    ):
        bars = axes.bar(np.arange(len(found)) + offset, heights, 0.4, color=color, label=f"{kind}: {what}")
        axes.bar_label(bars, fmt="%.0f")
    axes.axhline(100 / NUM_VALUES, color="black", linestyle=":", linewidth=1, label="guessing")
    axes.set_xticks(range(len(found)), list(found))
    axes.set_ylabel("right answers, %")
    axes.set_ylim(0, 135)
    axes.set_yticks(range(0, 101, 25))
    axes.legend(ncols=3, loc="upper center", fontsize=9)
    figure.savefig(arguments.out, dpi=120)


if __name__ == "__main__":
    main()
