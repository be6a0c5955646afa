"""Tables and pictures of what `run_studies.py` measured, for docs/evidence.md.

python -m benchmarks.evidence.report runs/evidence                          pictures in runs/evidence
python -m benchmarks.evidence.report runs/evidence --pictures docs          those of docs/evidence.md
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from benchmarks import card
from benchmarks.evidence import pictures, tables
from benchmarks.evidence.comparison import Results, read_results
from benchmarks.evidence.studies import STUDIES
from rat_jax import program
from rat_jax.paths import local_path

PICTURES = {
    "evidence-losses.png": pictures.draw_losses,
    "evidence-sweeps.png": pictures.draw_sweeps,
    "evidence-lengths.png": pictures.draw_lengths,
}


def text(results: Results) -> str:
    """All tables, under the questions of the studies."""
    parts = []
    for name, study in STUDIES.items():
        if any(kind in results.by_kind for kind in study.kinds):
            parts += [tables.question(name), tables.loss_table(results, study.kinds)]
    parts += ["## What is there beyond the training length?", tables.length_table(results, list(results.by_kind))]
    parts += [tables.published_table(results), "## What the papers say", tables.claims_table(results)]
    if failures := tables.failures_table(results):
        parts += ["## Models that failed", failures]
    deviation = results.seed_deviation
    if deviation is not None:
        parts.append(f"Pooled standard deviation of seeds: {deviation:.4f} nats.")
    minutes = f"{_minutes(results):.0f} minutes of training and measuring, summed over models"
    parts.append(f"{_models(results)}; {minutes}, which may have shared a card.")
    return "\n\n".join(parts)


def _models(results: Results) -> str:
    models = [model for result in results.by_kind.values() for model in result.models]
    devices = ", ".join(sorted({model.device for model in models}))
    versions = ", ".join(sorted({model.jax for model in models}))
    return f"{len(models)} models of {len(results.by_kind)} kinds, {devices}, jax {versions}"


def _minutes(results: Results) -> float:
    return sum(model.seconds for result in results.by_kind.values() for model in result.models) / 60


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = program.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where run_studies.py wrote")
    parser.add_argument("--pictures", help="folder of the pictures; left out: the same")
    return parser.parse_args(arguments)


def _report(flags: argparse.Namespace) -> None:
    folder = local_path(flags.folder, "FOLDER")
    out: pathlib.Path = folder if flags.pictures is None else local_path(flags.pictures, "--pictures")
    results = read_results(folder)
    print(text(results))
    for name, draw in PICTURES.items():
        figure = draw(results)
        card.write_caption(figure, _models(results))
        figure.savefig(out / name, dpi=110)
    print(f"\npictures: {', '.join(str(out / name) for name in PICTURES)}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints and draws; returns the exit code."""
    return program.exit_code(lambda: _report(_parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
