"""What is recorded of a trained model."""

import pathlib
from typing import Any

import jax

from benchmarks.evidence.token_losses import token_losses
from rat_jax.checkpoints import load_model
from rat_jax.config import config_to_dict
from rat_jax.data.corpus import Corpus
from rat_jax.errors import RatJaxError
from rat_jax.report.costs import num_parameters
from rat_jax.report.run import read_runs

LENGTHS = (1, 2, 4, 8)  # times the training length
_BATCH_TOKENS = 65_536


def check_split(corpus: str, seq_len: int) -> None:
    """Refuses a corpus whose validation split does not hold one sequence of the training length: `measure` has none.

    Raises:
      RatJaxError: with the number of its tokens, or if there is no such corpus.
    """
    num_tokens = Corpus.open(corpus).splits["validation"].num_tokens
    if num_tokens <= seq_len:
        raise RatJaxError(
            f"the validation split of {corpus} has {num_tokens} tokens, a model is measured on more than {seq_len}: "
            "prepare it with a larger --validation_fraction"
        )


def measure(workdir: pathlib.Path) -> dict[str, Any]:
    """The losses of a run's model on the whole validation split at all lengths, and how the run went.

    Values are such that JSON holds them. `document_losses` are sums over each document's targets, in nats, in the
    split's order; every length has the same targets. A length that the split does not hold is left out.

    Raises:
      RatJaxError: if model or data do not fit.
    """
    loaded = load_model(workdir)
    corpus = Corpus.open(loaded.config.data.path)
    num_tokens = corpus.splits["validation"].num_tokens
    run = read_runs([workdir])[0]
    values = {
        "training_tokens": run.num_tokens,
        "validation_losses": run.figures("validation_loss"),
        "config": config_to_dict(loaded.config),
        "parameters": num_parameters(loaded.config.model),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "lengths": {},
    }
    for times in LENGTHS:
        length = times * loaded.config.data.seq_len
        if length >= num_tokens:
            break
        found = token_losses(loaded, corpus, length, _BATCH_TOKENS)
        sums, targets = found.by_document()
        values["document_targets"] = targets.tolist()
        values["lengths"][str(length)] = {
            "loss": found.mean(),
            "loss_by_octave": found.by_octave(),
            "document_losses": [round(x, 3) for x in sums.tolist()],
        }
    return values
