"""Accuracy of trained models on the recall task, by the distance of what is asked for: a table, and docs/recall.png.

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

from rat_jax.checkpoint import LoadedModel, load_model
from rat_jax.data.pipeline import ValidationData
from rat_jax.data.recall import FAR_QUERIES, NEAR_QUERIES, NUM_VALUES, query_distances

BIN_TOKENS = 5


def answers(loaded: LoadedModel) -> tuple[np.ndarray, np.ndarray]:
    """Of every query of the validation split, a row a document: whether the answer is right, and the distance."""
    graphdef, params = nnx.split(loaded.model)
    predict: Callable = jax.jit(lambda params, tokens: jnp.argmax(nnx.merge(graphdef, params)(tokens), axis=-1))
    queries = [*NEAR_QUERIES, *FAR_QUERIES]
    right, distances = [], []
    for batch in ValidationData(loaded.config.data, vocab_size=loaded.config.model.vocab_size):
        rows = batch.loss_weights[:, queries].all(axis=1)  # the last batch may hold rows of padding
        found = np.asarray(predict(params, batch.tokens))
        right.append((found == batch.targets)[:, queries][rows])
        distances.append(query_distances(batch.tokens[rows]))
    return np.concatenate(right), np.concatenate(distances)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).with_name("recall.png"))
    arguments = parser.parse_args()
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    print("| mixer | steps | near queries (1 to 14 tokens back) | far queries (65 to 78 tokens back) |")
    print("|---|---|---|---|")
    for workdir in arguments.workdirs:
        loaded = load_model(workdir)
        right, distances = answers(loaded)
        (mixer,) = loaded.config.model.pattern
        near, far = (100 * right[:, part].mean() for part in (slice(len(NEAR_QUERIES)), slice(len(NEAR_QUERIES), None)))
        print(f"| {mixer} | {loaded.step} | {near:.1f} % | {far:.1f} % |")
        bins = distances // BIN_TOKENS
        points = np.unique(bins)
        accuracy = np.array([100 * right[bins == point].mean() for point in points])
        gap = int(np.argmax(np.diff(points))) + 1  # nothing is asked for at the distances between
        (line,) = axes.plot((points[:gap] + 0.5) * BIN_TOKENS, accuracy[:gap], "o-", markersize=3, label=mixer)
        axes.plot((points[gap:] + 0.5) * BIN_TOKENS, accuracy[gap:], "o-", markersize=3, color=line.get_color())
    axes.axvline(32, color="gray", linestyle="--", linewidth=1, label="window")
    axes.axhline(100 / NUM_VALUES, color="gray", linestyle=":", linewidth=1, label="guessing")
    axes.set_xlabel("tokens between the pair and its query")
    axes.set_ylabel("right answers, %")
    axes.set_ylim(0, 102)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(arguments.out, dpi=120)


if __name__ == "__main__":
    main()
