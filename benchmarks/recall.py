"""Accuracy of trained models on the recall task, near and far queries apart: a table and a picture.

The task is that of `rat_jax/data/recall.py`, the models those of `configs/recall.py`. A model's answer is its likeliest
token after a queried key, in documents of the validation split.

  python benchmarks/recall.py runs/recall_*                          the picture is runs/recall.png
  python benchmarks/recall.py runs/recall_* --out docs/recall.png    that of docs/recall.md
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import card
from rat_jax import program
from rat_jax.checkpoints.store import LoadedModel, load_model
from rat_jax.data.pipeline import ValidationData
from rat_jax.data.recall import DOCUMENT_TOKENS, FAR_QUERIES, NEAR_QUERIES, NUM_VALUES, VOCAB_SIZE
from rat_jax.errors import RatJaxError
from rat_jax.paths import local_path

KINDS = {"near": "1 to 14 tokens back", "far": "65 to 78 tokens back"}


class Row(NamedTuple):
    """What one run's model answers."""

    mixers: str
    step: int
    dtype: str
    near: float  # right answers in percent
    far: float


def measure(loaded: LoadedModel) -> Row:
    """Right answers to the near and to the far queries of the validation split.

    Raises:
      RatJaxError: if the model was trained on another task.
    """
    model, data = loaded.config.model, loaded.config.data
    if (model.vocab_size, data.seq_len) != (VOCAB_SIZE, DOCUMENT_TOKENS):
        raise RatJaxError(
            f"{loaded.path} is no model of configs/recall.py: it has a vocabulary of {model.vocab_size} and sequences "
            f"of {data.seq_len} tokens, the recall task {VOCAB_SIZE} and {DOCUMENT_TOKENS}"
        )
    graphdef, params = nnx.split(loaded.model)
    predict = jax.jit(lambda params, tokens: jnp.argmax(nnx.merge(graphdef, params)(tokens), axis=-1))
    queries = [*NEAR_QUERIES, *FAR_QUERIES]
    right = []
    for batch in ValidationData(data, vocab_size=model.vocab_size):
        rows = batch.loss_weights[:, queries].all(axis=1)  # the last batch may hold rows of padding
        found = np.asarray(predict(params, batch.tokens))
        right.append((found == batch.targets)[:, queries][rows])
    near, far = np.split(100 * np.concatenate(right).mean(axis=0), [len(NEAR_QUERIES)])
    return Row(", ".join(model.pattern), loaded.step, model.dtype, float(near.mean()), float(far.mean()))


def draw(rows: Sequence[Row], caption: str) -> Figure:
    """Two bars for each run."""
    figure = Figure(figsize=(max(8.0, 1.5 * len(rows)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for offset, color, (kind, what) in zip((-0.2, 0.2), ("tab:gray", "tab:blue"), KINDS.items(), strict=True):
        heights = [row.near if kind == "near" else row.far for row in rows]
        bars = axes.bar(np.arange(len(rows)) + offset, heights, 0.4, color=color, label=f"{kind}: {what}")
        axes.bar_label(bars, fmt="%.0f")
    axes.axhline(100 / NUM_VALUES, color="black", linestyle=":", linewidth=1, label="guessing")
    axes.set_xticks(range(len(rows)), [row.mixers for row in rows])
    axes.set_ylabel("right answers, %")
    axes.set_ylim(0, 135)
    axes.set_yticks(range(0, 101, 25))
    axes.legend(ncols=3, loc="upper center", fontsize=9)
    card.write_caption(figure, caption)
    return figure


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = program.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", nargs="+")
    parser.add_argument("--out", help="PNG; left out: recall.png in the folder of the first workdir")
    return parser.parse_args(arguments)


def _print_and_draw(flags: argparse.Namespace) -> None:
    workdirs = [local_path(workdir, "WORKDIR") for workdir in flags.workdirs]
    out = workdirs[0].resolve().parent / "recall.png" if flags.out is None else local_path(flags.out, "--out")
    print("| mixer | steps | " + " | ".join(f"{kind} queries ({what})" for kind, what in KINDS.items()) + " |")
    print("|---|---|---|---|")
    rows = []
    for workdir in workdirs:
        row = measure(load_model(workdir))
        rows.append(row)
        print(f"| {row.mixers} | {row.step} | {row.near:.1f} % | {row.far:.1f} % |", flush=True)
    caption = card.caption(", ".join(dict.fromkeys(row.dtype for row in rows)))
    draw(rows, caption).savefig(out, dpi=120)
    print(f"\n{caption}; picture: {out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and writes the picture; returns the exit code."""
    return program.exit_code(lambda: _print_and_draw(_parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
