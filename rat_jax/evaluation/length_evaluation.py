"""The loss of a checkpoint at positions beyond its training length: printed, then written."""

import json
import pathlib
import sys

import jax

from rat_jax.errors import RunStopped
from rat_jax.evaluation import length_generalization, length_report, results
from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.progress import Progress
from rat_jax.evaluation.subject import Subject
from rat_jax.files import FileError, write_json


def evaluate_length_generalization(
    subject: Subject,
    times: int,
    *,
    batch_tokens: int,
    max_batches: int | None,
    print_json: bool,
    progress: Progress,
) -> None:
    """Prints a table, then writes length_generalization-STEP-CORPUS-LENGTH-DIGEST.json and .png.

    Args:
      subject: what is evaluated.
      times: sequences are so many times as long as those of the training.
      batch_tokens: tokens computed at a time, over all devices.
      max_batches: evenly spread over the split; None: the whole split.
      print_json: instead of the table.
      progress: as of `length_generalization.measure`.

    Raises:
      RatJaxError: if nothing could be computed.
      RunStopped: if a file could not be written.
    """
    if times < 1:
        raise EvaluationError(f"--length_generalization must be 1 or more, got {times}")
    loaded, corpus = subject.loaded, subject.corpus()
    measured = length_generalization.measure(
        loaded,
        corpus,
        subject.mesh,
        times * loaded.config.data.seq_len,
        batch_tokens=batch_tokens,
        max_batches=max_batches,
        progress=progress,
    )
    if jax.process_index() != 0:
        return
    values = results.lengths_as_json(loaded, corpus, measured)
    print(json.dumps(values) if print_json else length_report.table(values), flush=True)
    path = results.lengths_path(subject.workdir.path, values)
    json_file, picture = pathlib.Path(f"{path}.json"), pathlib.Path(f"{path}.png")
    try:
        write_json(json_file, values)
        length_report.plot([values], picture)
    except FileError as error:
        raise RunStopped(str(error)) from None
    print(f"written to {json_file} and {picture}", file=sys.stderr)
