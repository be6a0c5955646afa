"""The page: sections of tables and charts as one file of HTML that needs nothing else."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Sequence

import jinja2

from rat_jax.report import chart, curves, run_tables, score_tables
from rat_jax.report.run import Run
from rat_jax.report.table import Table

GENERATOR = "rat_jax.report"
TEMPLATES = pathlib.Path(__file__).with_name("templates")
# HTML has no place for most control characters, and those of directions can make a text seem another.
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page under a heading of its own."""

    title: str
    notes: tuple[str, ...]  # what a reader should know before the figures
    tables: tuple[Table, ...] = ()
    drawings: tuple[chart.Drawing, ...] = ()

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")


def render(runs: Sequence[Run]) -> bytes:
    """The page about one run or several, in UTF-8; the same runs give the same bytes."""
    names = ", ".join(run.label for run in runs)
    template = _environment().get_template("page.html")
    html = template.render(
        title=f"Run {names}" if len(runs) == 1 else f"{len(runs)} runs: {names}",
        generator=GENERATOR,
        runs=runs,
        sections=sections(runs),
        marker=chart.marker,
        num_colours=chart.NUM_COLOURS,
        width=chart.WIDTH,
        height=chart.HEIGHT,
    )
    return html.encode("utf-8", "backslashreplace")  # names of files may hold what is no character


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: _UNSHOWABLE.sub("\ufffd", value) if type(value) is str else value,
    )


def sections(runs: Sequence[Run]) -> list[Section]:
    """What there is to show of the runs."""
    found = [
        Section("Runs", _remarks(runs), (run_tables.overview(runs),)),
        _training(runs),
        _evaluation(runs),
        _scores(runs),
        _costs(runs),
    ]
    fields, notes = run_tables.configs(runs), ()
    if not fields.rows:
        is_read = any(run.config is not None for run in runs)
        notes = ("No field of the configs differs." if is_read else "No config can be read.",)
    return [*found, Section("Config", notes, (fields,) if fields.rows else ())]


def _remarks(runs: Sequence[Run]) -> tuple[str, ...]:
    notes = []
    if curves.several_tokenizers(runs):
        notes.append(
            "The runs have different tokenizers, or one that is not known. Nats a token and perplexities of different "
            "tokens cannot be compared: compare bits a byte."
        )
    for run in runs:
        notes += [f"{run.label}: {remark}" for remark in run.remarks]
    return tuple(notes)


def _training(runs: Sequence[Run]) -> Section:
    charts = curves.loss_charts(runs)
    without = [run.label for run in runs if not run.figures("mean_loss", "loss", "validation_loss")]
    notes = []
    if charts:
        notes.append(
            "Thin: training, the mean since the point before. With markers: validation, each run on its own split. A "
            "loss axis ends where the losses are after a tenth of the run; what is higher is cut off."
        )
    if without:
        notes.append(f"No losses in the log of {', '.join(without)}.")
    unknown = [run.label for run in runs if run.bits_per_byte("train", 1.0) is None]
    if curves.several_tokenizers(runs) and unknown:
        notes.append(
            f"Not in bits a byte, since the corpus is not there or its bytes are unknown: {', '.join(unknown)}."
        )
    return Section("Training", tuple(notes), drawings=tuple(map(chart.draw, charts)))


def _evaluation(runs: Sequence[Run]) -> Section:
    tables = [table for table in (run_tables.losses(runs), run_tables.lengths(runs)) if table is not None]
    charts = [*curves.position_charts(runs), *curves.length_charts(runs)]
    without = [run.label for run in runs if not run.measurements.losses]
    notes = (f"No evaluation of {', '.join(without)}: eval.py makes one.",) if without else ()
    return Section("Perplexity", notes, tuple(tables), tuple(map(chart.draw, charts)))


def _scores(runs: Sequence[Run]) -> Section:
    tables = score_tables.score_tables(runs)
    notes = () if tables else ("No scores of tasks in these workdirs.",)
    return Section("Tasks", notes, tuple(tables))


def _costs(runs: Sequence[Run]) -> Section:
    tables = [table for table in (run_tables.speed(runs), run_tables.caches(runs)) if table is not None]
    slow = [run.label for run in runs if not run.figures("tokens_per_sec")]
    notes = (f"No speed in the log of {', '.join(slow)}.",) if slow else ()
    return Section("Speed and memory", notes, tuple(tables))
