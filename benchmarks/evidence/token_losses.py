"""The loss of every token of a validation split, and its sums by document and by position."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from rat_jax.checkpoints import LoadedModel
from rat_jax.data.batch import Batch
from rat_jax.data.corpus import Corpus
from rat_jax.data.pipeline import ValidationData
from rat_jax.evaluation.perplexity import bucket_edges
from rat_jax.evaluation.position_sums import PositionSums
from rat_jax.loss import token_scores


@dataclasses.dataclass(frozen=True)
class TokenLosses:
    """-log p of the targets of a split, in its order, read in sequences of one length."""

    context_length: int
    losses: np.ndarray  # float64, nats
    documents: np.ndarray  # the number of each target's document in the split, from 0
    positions: np.ndarray  # in the sequence, of the token before it

    def mean(self) -> float:
        """In nats a token."""
        return float(self.losses.mean())

    def by_document(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums of losses and numbers of targets of all documents, up to the last that has any."""
        return np.bincount(self.documents, self.losses), np.bincount(self.documents)

    def by_octave(self) -> list[tuple[int, float]]:
        """The first position of each octave of positions, the first of which are 0 to 15, and the mean loss there."""
        sums = PositionSums(
            np.bincount(self.positions, self.losses, minlength=self.context_length),
            np.bincount(self.positions, minlength=self.context_length),
        )
        buckets = sums.buckets(range(self.context_length + 1), bucket_edges(self.context_length, per_octave=1))
        return [(bucket.first, bucket.loss) for bucket in buckets if bucket.loss is not None]


@functools.partial(jax.jit, static_argnames="graphdef")
def _losses(graphdef: nnx.GraphDef, params: nnx.State, batch: Batch) -> jax.Array:
    model = nnx.merge(graphdef, params)
    hidden = model.hidden(batch.tokens, batch.segment_ids)
    return -token_scores(hidden, model.embedding[...], batch.targets).log_probs


def token_losses(loaded: LoadedModel, corpus: Corpus, context_length: int, batch_tokens: int) -> TokenLosses:
    """Reads the whole validation split; targets are those of `rat_jax.evaluation.perplexity`, and so are losses.

    Args:
      loaded: the model, on one device.
      corpus: of the split.
      context_length: tokens of a sequence.
      batch_tokens: tokens computed at a time.

    Raises:
      DataError: if the data do not fit the model.
    """
    graphdef, params = nnx.split(loaded.model)
    rows = max(1, batch_tokens // context_length)
    changes = {"path": str(corpus.path), "seq_len": context_length, "global_batch_size": rows}
    config = dataclasses.replace(loaded.config.data, **changes)
    losses, tokens, weights = [], [], []
    for batch in ValidationData(config, vocab_size=loaded.config.model.vocab_size):
        losses.append(np.asarray(_losses(graphdef, params, batch), np.float64).reshape(-1))
        tokens.append(batch.tokens.reshape(-1))
        weights.append(batch.loss_weights.reshape(-1))
    counts = np.concatenate(weights) > 0
    documents = np.cumsum(np.concatenate(tokens) == corpus.tokenizer().eos_id)
    positions = np.arange(counts.size) % context_length
    return TokenLosses(context_length, np.concatenate(losses)[counts], documents[counts], positions[counts])
