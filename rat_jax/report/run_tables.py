"""Figures of the runs side by side: how far they are, losses, speed, caches, and where their configs differ."""

import pathlib
import statistics
from collections.abc import Sequence

from rat_jax.checkpoints.workdir import flatten
from rat_jax.config import config_to_dict
from rat_jax.data.pipeline import describe_coverage
from rat_jax.report import amounts
from rat_jax.report.costs import cache_bytes, num_parameters, training_flops
from rat_jax.report.curves import newest_lengths, newest_losses, several_tokenizers
from rat_jax.report.measurements import MeasuredLoss
from rat_jax.report.run import Run, labels
from rat_jax.report.table import Cell, Head, Row, Table, texts, without_empty_columns

_CACHE_LENGTHS = (1024, 4096, 16_384, 65_536, 262_144)
_NOT_SET = amounts.ABSENT
_TOKENS_DIFFER = (
    "The runs have different tokenizers: nats a token and perplexities of different tokens cannot be compared."
)


def overview(runs: Sequence[Run]) -> Table:
    """What each run is and how far it has come."""
    columns = (
        Head("run"),
        Head("state", is_text=True),
        Head("mixers", is_text=True),
        Head("parameters"),
        Head("tokens read"),
        Head("tokenizer", is_text=True),
        Head("validation loss"),
        Head("at step"),
        Head("measured on", is_text=True),
    )
    rows = []
    for index, run in enumerate(runs):
        validation = run.figures("validation_loss")
        fraction = run.figures("validation_fraction")
        step, loss = validation[-1] if validation else (None, None)
        model = None if run.config is None else run.config.model
        cells = texts(
            run.state,
            amounts.ABSENT if model is None else ", ".join(model.pattern),
            amounts.count(None if model is None else num_parameters(model)),
            amounts.count(run.num_tokens),
            run.tokenizer_name,
            amounts.fixed(loss),
            amounts.count(step),
            describe_coverage(fraction[-1][1]) if validation and fraction else amounts.ABSENT,
        )
        rows.append(Row(Head(run.label, index, str(run.path)), cells))
    notes = ("Validation losses are the log's last ones, in nats a token.",)
    return without_empty_columns(Table("How far each run is", columns, tuple(rows), notes))


def losses(runs: Sequence[Run]) -> Table | None:
    """Losses and perplexities that were measured of checkpoints; None where there are none."""
    columns = ("run", "step", "context", "tokens", "nats a token", "perplexity", "bits a byte", "nats a byte", "bytes")
    measured = [(index, run, loss) for index, run in enumerate(runs) for loss in newest_losses(run)]
    if not measured:
        return None
    data = list(dict.fromkeys(loss.data_hash for _, _, loss in measured))
    measured.sort(key=lambda member: (data.index(member[2].data_hash), member[2].figures.context_length, member[0]))
    names = _data_names([loss for _, _, loss in measured])
    rows = []
    for index, run, loss in measured:
        figures = loss.figures
        cells = texts(
            amounts.count(loss.step),
            amounts.count(figures.context_length),
            amounts.count(figures.num_targets),
            amounts.fixed(figures.loss),
            amounts.fixed(figures.perplexity, 3),
            amounts.fixed(figures.bits_per_byte),
            amounts.fixed(figures.nats_per_byte),
            amounts.count(figures.num_bytes),
        )
        detail = f"{names[loss.data_path, loss.data_hash]}: {describe_coverage(figures.split_fraction)}"
        rows.append(Row(Head(run.label, index, detail), cells))
    notes = (
        "Of the newest step that was measured. Tokens are those that were predicted; bytes are those of their text, "
        "known where it is the whole split.",
        *_comparability(runs, measured),
    )
    table = Table("Losses of checkpoints on validation splits", tuple(map(Head, columns)), tuple(rows), notes)
    return without_empty_columns(table)


def lengths(runs: Sequence[Run]) -> Table | None:
    """Losses within and beyond the training length; None where there are none."""
    columns = ("run", "step", "trained on", "context", "tokens", "within, nats", "beyond, nats", "difference")
    measured = [(index, run, loss) for index, run in enumerate(runs) for loss in newest_lengths(run)]
    if not measured:
        return None
    names = _data_names([loss for _, _, loss in measured])
    rows = []
    for index, run, loss in measured:
        figures = loss.figures
        within, beyond = figures.loss_within, figures.loss_beyond
        cells = texts(
            amounts.count(loss.step),
            amounts.count(figures.trained_length),
            amounts.count(figures.context_length),
            amounts.count(figures.num_targets),
            amounts.fixed(within),
            amounts.fixed(beyond),
            amounts.fixed(None if within is None or beyond is None else beyond - within),
        )
        detail = f"{names[loss.data_path, loss.data_hash]}: {describe_coverage(figures.split_fraction)}"
        rows.append(Row(Head(run.label, index, detail), cells))
    notes = ["Of the newest step that was measured; the dashed line of a chart is the training length."]
    if several_tokenizers(runs):
        notes.append(_TOKENS_DIFFER)
    caption = "Losses at positions within and beyond the training length"
    return Table(caption, tuple(map(Head, columns)), tuple(rows), tuple(notes))


def _data_names(losses: Sequence[MeasuredLoss]) -> dict[tuple[str, str], str]:
    """Short names of data by path and hash; data that changed since it was measured has two."""
    hashes: dict[str, set[str]] = {}
    for loss in losses:
        hashes.setdefault(loss.data_path, set()).add(loss.data_hash)
    short = dict(zip(hashes, labels([pathlib.PurePath(path) for path in hashes]), strict=True))
    return {
        (path, data_hash): short[path] + (f" ({data_hash[:8]})" if len(hashes[path]) > 1 else "")
        for path in hashes
        for data_hash in hashes[path]
    }


def _comparability(runs: Sequence[Run], measured: Sequence[tuple]) -> tuple[str, ...]:
    notes = []
    if several_tokenizers(runs):
        notes.append(f"{_TOKENS_DIFFER} Bits a byte can, where the bytes are the same.")
    elif len({loss.data_hash for _, _, loss in measured}) > 1:
        notes.append("The losses are of different data: compare rows of the same data alone.")
    if len({loss.figures.split_fraction for _, _, loss in measured}) > 1:
        notes.append("The losses are of different parts of the split: compare rows of the same part alone.")
    older = sum(len(run.measurements.losses) - len(newest_losses(run)) for run in runs)
    if older:
        notes.append(f"Evaluations of earlier steps that are left out: {older}.")
    return tuple(notes)


def speed(runs: Sequence[Run]) -> Table | None:
    """Throughput by the logs; None where no log has it."""
    columns = ("run", "tokens/s", "middle 80 %", "MFU", "devices", "batch, tokens", "FLOPs a token", "records")
    rows = []
    for index, run in enumerate(runs):
        speeds, used = run.figures("tokens_per_sec"), run.figures("mfu")
        if not speeds:
            continue
        values = [value for _, value in speeds]
        deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values
        cells = texts(
            f"{statistics.median(values):,.0f}",
            f"{deciles[0]:,.0f} to {deciles[-1]:,.0f}",
            amounts.percent(statistics.median(value for _, value in used) if used else None),
            run.devices or "not recorded",
            amounts.count(run.tokens_per_step),
            amounts.short(None if run.config is None else training_flops(run.config)),
            amounts.count(len(values)),
        )
        rows.append(Row(Head(run.label, index), cells))
    if not rows:
        return None
    notes = (
        "Medians of the log's records. MFU is there where the device's peak is known; devices are those of the newest "
        "checkpoint.",
    )
    table = Table("Speed of training, over all devices", tuple(map(Head, columns)), tuple(rows), notes)
    return without_empty_columns(table)


def caches(runs: Sequence[Run]) -> Table | None:
    """Bytes of a row's cache; None where no config can be read."""
    members = [(index, run) for index, run in enumerate(runs) if run.config is not None]
    if not members:
        return None
    columns = [Head("context")]
    sizes = []
    for index, run in members:
        columns.append(Head(run.label, index, run.config.model.dtype))
        sizes.append(cache_bytes(run.config.model, _CACHE_LENGTHS))
    rows = []
    for place, length in enumerate(_CACHE_LENGTHS):
        taken = [size[place] for size in sizes]
        cells = (f"{total / length:,.1f} ({amounts.num_bytes(total)})" for total in taken)
        rows.append(Row(Head(f"{length:,}"), texts(*cells)))
    caption = "Cache of a row: bytes a token, and all of it in parentheses"
    return Table(caption, tuple(columns), tuple(rows))


def configs(runs: Sequence[Run]) -> Table:
    """Fields that differ between the runs; of one run all."""
    members = [(index, run) for index, run in enumerate(runs) if run.config is not None]
    flat = [flatten(config_to_dict(run.config)) for _, run in members]
    names = list(dict.fromkeys(name for fields in flat for name in fields))
    texts_of = {
        name: [amounts.plain(fields[name]) if name in fields else _NOT_SET for fields in flat] for name in names
    }
    shown = [name for name in names if len(members) == 1 or len(set(texts_of[name])) > 1]
    rows = tuple(Row(Head(name), tuple(map(Cell, texts_of[name]))) for name in shown)
    columns = (Head("field"), *(Head(run.label, index, is_text=True) for index, run in members))
    if len(members) == 1:
        return Table("The config", columns, rows)
    same = len(names) - len(shown)
    return Table(f"Config fields that differ between the runs; {same} are the same", columns, rows)
