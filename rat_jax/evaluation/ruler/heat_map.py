"""RULER's answers by depth and context length, as a picture."""

import math
import pathlib

import numpy as np

from rat_jax.evaluation.ruler.evaluation import RulerResults
from rat_jax.evaluation.ruler.measurement import NUM_DEPTHS
from rat_jax.pictures import write_picture

_COLUMNS = 4  # of panels


def heat_grid(results: RulerResults, task: str) -> tuple[list[int], np.ndarray]:
    """The context lengths of a task, and the share of answers found [depths, lengths]; NaN where none was asked for."""
    measurements = sorted((one for one in results.measurements if one.task == task), key=lambda one: one.context_length)
    grid = np.full((NUM_DEPTHS, len(measurements)), np.nan)
    for column, measurement in enumerate(measurements):
        for count in measurement.by_depth():
            grid[round(count.depth * (NUM_DEPTHS - 1)), column] = count.num_found / count.num_answers
    return [one.context_length for one in measurements], grid


def has_depths(results: RulerResults) -> bool:
    """Whether there is anything to draw: tasks whose answers stand at a depth."""
    return any(one.by_depth() for one in results.measurements)


def draw_heat_map(results: RulerResults, path: pathlib.Path) -> None:
    """Draws a panel for each task with needles: depth down, context length across, the share found as colour.

    Raises:
      FileError: if the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(one.task for one in results.measurements if one.by_depth()))
    rows, columns = math.ceil(len(tasks) / _COLUMNS), min(len(tasks), _COLUMNS)
    figure = Figure(figsize=(3.6 * columns + 1.2, 3.4 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    for axes, task in zip(panels, tasks, strict=False):
        lengths, grid = heat_grid(results, task)
        image = axes.imshow(np.ma.masked_invalid(grid), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_facecolor("lightgray")
        axes.set_title(task, fontsize=10)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
        axes.set_yticks(
            range(NUM_DEPTHS), [f"{100 * row // (NUM_DEPTHS - 1)}" for row in range(NUM_DEPTHS)], fontsize=8
        )
        axes.set_xlabel("context, tokens", fontsize=8)
        axes.set_ylabel("depth of the needle, %", fontsize=8)
        for row, column in zip(*np.nonzero(~np.isnan(grid)), strict=True):
            share = grid[row, column]
            color = "black" if share > 0.6 else "white"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, ax=panels.tolist(), label="answers found", shrink=0.8)
    write_picture(figure, path)
