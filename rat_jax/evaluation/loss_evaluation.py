"""The loss of a checkpoint on the validation split at several context lengths: printed, then written."""

import json
import pathlib
import sys
from collections.abc import Sequence

import jax

from rat_jax.data.corpus import Corpus
from rat_jax.errors import RatJaxError, RunStopped
from rat_jax.evaluation import perplexity, report, results
from rat_jax.evaluation.perplexity import Evaluation
from rat_jax.evaluation.progress import Progress
from rat_jax.evaluation.subject import Subject
from rat_jax.files import FileError, write_json


def evaluate_losses(
    subject: Subject,
    lengths: Sequence[int],
    *,
    batch_tokens: int,
    max_batches: int | None,
    print_json: bool,
    progress: Progress,
) -> None:
    """Prints a table, then writes it and a picture into the workdir.

    Args:
      subject: what is evaluated.
      lengths: of contexts, all checked before the first is computed.
      batch_tokens: tokens computed at a time, over all devices.
      max_batches: of each length, evenly spread over the split; None: the whole split.
      print_json: instead of the table.
      progress: as of `evaluate`.

    Raises:
      RatJaxError: if nothing could be computed.
      RunStopped: if a later length failed, or a file could not be written.
    """
    corpus = subject.corpus()
    for length in lengths:
        perplexity.check_fits(subject.loaded, corpus, subject.mesh, length, batch_tokens)
    settings = {"batch_tokens": batch_tokens, "max_batches": max_batches, "progress": progress}
    evaluations: list[Evaluation] = []
    try:
        for length in lengths:
            evaluations.append(perplexity.evaluate(subject.loaded, corpus, subject.mesh, length, **settings))
    except (RatJaxError, KeyboardInterrupt) as error:
        if not evaluations:
            raise
        _give_out(subject, corpus, evaluations, print_json)
        what = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        raise RunStopped(f"only the context lengths above are done: {what}") from None
    _give_out(subject, corpus, evaluations, print_json)


def _give_out(subject: Subject, corpus: Corpus, evaluations: Sequence[Evaluation], print_json: bool) -> None:
    if jax.process_index() != 0:
        return
    values = results.as_json(subject.loaded, corpus, evaluations)
    print(json.dumps(values) if print_json else report.table(evaluations), flush=True)
    path = results.results_path(subject.workdir.path, values)
    json_file, picture = pathlib.Path(f"{path}.json"), pathlib.Path(f"{path}.png")
    try:
        write_json(json_file, values)
        report.plot(evaluations, picture, trained_length=subject.loaded.config.data.seq_len)
    except FileError as error:
        raise RunStopped(str(error)) from None
    print(f"written to {json_file} and {picture}", file=sys.stderr)
