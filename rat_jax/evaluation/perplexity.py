"""How well a model predicts the validation split: loss, perplexity, and the loss at each position of the context."""

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rat_jax.checkpoints.store import LoadedModel
from rat_jax.checkpoints.workdir import Workdir
from rat_jax.data import DataError
from rat_jax.data.corpus import Corpus
from rat_jax.data.pipeline import Batch, ValidationData
from rat_jax.data.tokenizer import load_tokenizer
from rat_jax.errors import RatJaxError
from rat_jax.mesh import constrain_rows, replicate, rows_per_device
from rat_jax.model import LanguageModel
from rat_jax.shapes import Array, Float32
from rat_jax.sharding import global_batch

_BLOCK_LOGITS = 1 << 26  # logits that a device holds at a time
_FIRST_BUCKET = 16  # positions


class EvaluationError(RatJaxError, ValueError):
    """An evaluation that has no result; the message says what to change."""


class PositionSums(NamedTuple):
    """Sums over the rows of batches; position t is that of the t-th input token, whose target is the next one."""

    loss: Float32[Array, " T"] | np.ndarray  # of weight * -log p(target), in nats
    weight: Float32[Array, " T"] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The mean loss at neighbouring positions."""

    first: int
    last: int
    num_targets: float
    loss: float | None  # nats a token; None where no target counts

    @property
    def middle(self) -> float:
        """The geometric middle, counted from 1: where a logarithmic axis shows the bucket."""
        return math.sqrt((self.first + 1) * (self.last + 1))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Loss of the validation split in sequences of one length."""

    context_length: int
    sums: PositionSums  # float64, [context_length]
    bytes_per_token: float | None  # of the split's text; None where that is not known

    @property
    def num_targets(self) -> int:
        """Tokens that were predicted: all but the first, and those whose input ends a document."""
        return round(float(self.sums.weight.sum()))

    @property
    def loss(self) -> float:
        """Mean over the targets, in nats a token."""
        return float(self.sums.loss.sum() / self.sums.weight.sum())

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """loss / (ln 2 * bytes a token): of the text, whatever the tokenizer."""
        return None if self.bytes_per_token is None else self.loss / (math.log(2) * self.bytes_per_token)

    def buckets(self, per_octave: int = 1) -> list[Bucket]:
        """Means over positions 0 .. 15, 16 .. 31, 32 .. 63, ...; from 16 on in `per_octave` parts of each range."""
        edges = bucket_edges(self.context_length, per_octave)
        buckets = []
        for first, end in itertools.pairwise(edges):
            loss, weight = (float(x[first:end].sum()) for x in self.sums)
            buckets.append(Bucket(first, end - 1, weight, loss / weight if weight > 0 else None))
        return buckets

    def as_json(self) -> dict[str, Any]:
        """All figures, as values that JSON can hold."""
        return {
            "context_length": self.context_length,
            "num_targets": self.num_targets,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "loss_by_position": [dataclasses.asdict(bucket) for bucket in self.buckets(per_octave=4)],
        }


@functools.partial(jax.jit, static_argnames="graphdef")
def position_losses(graphdef: nnx.GraphDef, params: nnx.State, batch: Batch) -> PositionSums:
    """Sums over rows of w_bt (logsumexp_v(h_bt . E_v) - h_bt . E_{y_bt}) and of w_bt, one for each position t.

    Logits are float32 and made for one block of positions at a time.

    Args:
      graphdef: of the model, from `nnx.split`.
      params: of the model, float32.
      batch: targets y and weights w, with rows for all devices of the mesh in use, if any.
    """
    model = nnx.merge(graphdef, params)
    hidden = constrain_rows(model.hidden(constrain_rows(batch.tokens), batch.segment_ids))
    num_rows, num_tokens = batch.tokens.shape
    length = max(1, min(num_tokens, _BLOCK_LOGITS // (rows_per_device(num_rows) * model.config.vocab_size)))

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, -num_tokens % length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(num_rows, -1, length, *x.shape[2:]), 1, 0)

    def block_losses(block):
        hidden_BTD, targets_BT, weights_BT = block
        logits = model.logits(hidden_BTD)
        of_target = jnp.take_along_axis(logits, targets_BT[..., None], axis=-1)[..., 0]
        return jnp.sum(weights_BT * (jax.nn.logsumexp(logits, axis=-1) - of_target), axis=0)

    losses = jax.lax.map(block_losses, (cut(hidden), cut(batch.targets), cut(batch.loss_weights)))
    return replicate(PositionSums(losses.reshape(-1)[:num_tokens], batch.loss_weights.sum(axis=0)))


def sum_losses(model: LanguageModel, batches: Iterable[Batch], mesh: jax.sharding.Mesh) -> PositionSums:
    """`position_losses` over all batches, added in float64.

    Args:
      model: on the mesh, as `rat_jax.checkpoints.store.load_model` puts it.
      batches: this host's rows, of one shape.
      mesh: whose devices divide the rows.

    Raises:
      EvaluationError: if nothing counts, or a loss is not finite.
    """
    graphdef, params = nnx.split(model)
    total, under_way = None, None
    with jax.set_mesh(mesh):
        for batch in batches:
            started = position_losses(graphdef, params, global_batch(batch, mesh))
            total = _add(total, under_way)  # while the device computes
            under_way = started
    total = _add(total, under_way)
    if total is None or total.weight.sum() == 0:
        raise EvaluationError("no token of the validation split counts: it holds nothing but ends of documents")
    if not np.isfinite(total.loss).all():
        raise EvaluationError(
            f"the loss at position {int(np.argmin(np.isfinite(total.loss)))} is not finite: the model's parameters are "
            f"damaged, or too large for {model.config.dtype}"
        )
    return total


def _add(total: PositionSums | None, more: PositionSums | None) -> PositionSums | None:
    if more is None:
        return total
    more = PositionSums(*(np.asarray(x, np.float64) for x in more))
    return more if total is None else PositionSums(*map(np.add, total, more))


def evaluate(
    loaded: LoadedModel,
    corpus: Corpus,
    mesh: jax.sharding.Mesh,
    context_length: int,
    *,
    batch_tokens: int,
    max_batches: int | None,
    progress: Callable[[Iterable[Batch], int], Iterable[Batch]] = lambda batches, num_batches: batches,
) -> Evaluation:
    """Evaluates a model on the validation split, cut in order into sequences of one length.

    Sequences are windows of the split's stream of documents; every token but the first is a target once, whatever the
    length, so that results of several lengths compare the same targets. Where the model was trained with
    `data.segment_documents`, no mixer looks across a document's end here either.

    Args:
      loaded: the model, on the mesh.
      corpus: whose tokenizer is the model's.
      mesh: of the devices.
      context_length: tokens of a sequence; may exceed `data.seq_len`.
      batch_tokens: tokens computed at a time; the result does not depend on it.
      max_batches: stop after so many. None: the whole split.
      progress: wraps the batches, of which the number is given.

    Raises:
      DataError: if the data do not fit the model.
      EvaluationError: a setting out of range, or no result.
    """
    for name, value in (
        ("context length", context_length),
        ("batch_tokens", batch_tokens),
        ("max_batches", max_batches),
    ):
        if value is not None and value < 1:
            raise EvaluationError(f"{name} must be 1 or more, got {value}")
    num_rows = max(1, batch_tokens // (context_length * mesh.size)) * mesh.size
    config = dataclasses.replace(
        loaded.config.data,
        path=str(corpus.path),
        seq_len=context_length,
        global_batch_size=num_rows,
        num_workers=0,
    )
    data = ValidationData(config, vocab_size=loaded.config.model.vocab_size)
    num_batches = len(data) if max_batches is None else min(len(data), max_batches)
    batches: Iterator[Batch] = itertools.islice(iter(data), num_batches)
    sums = sum_losses(loaded.model, progress(batches, num_batches), mesh)
    return Evaluation(context_length, sums, corpus.splits["validation"].bytes_per_token)


def check_tokenizer(corpus: Corpus, workdir: Workdir) -> None:
    """Refuses data of another tokenizer than the one that the workdir holds, if it holds one.

    Raises:
      DataError: naming both folders.
    """
    if workdir.tokenizer.is_dir() and load_tokenizer(workdir.tokenizer).hash != corpus.tokenizer_hash:
        raise DataError(
            f"{corpus.path} was made by another tokenizer than the model's, which is in {workdir.tokenizer}: prepare "
            f"the data with that one, and give their folder as --data_path"
        )


def bucket_edges(context_length: int, per_octave: int) -> list[int]:
    """First positions of the buckets, and `context_length`."""
    edges, first = [0], _FIRST_BUCKET
    while first < context_length:
        edges += [first + first * part // per_octave for part in range(per_octave)]
        first *= 2
    return [edge for edge in edges if edge < context_length] + [context_length]


def table(evaluations: Sequence[Evaluation]) -> str:
    """Text: one line for each context length, then the loss by position with a column for each."""
    lines = [f"{'context':>10} {'tokens':>13} {'loss':>8} {'perplexity':>11} {'bits/byte':>10}"]
    for evaluation in evaluations:
        bits = "" if evaluation.bits_per_byte is None else f"{evaluation.bits_per_byte:.4f}"
        lines.append(
            f"{evaluation.context_length:>10} {evaluation.num_targets:>13,} {evaluation.loss:>8.4f} "
            f"{evaluation.perplexity:>11.3f} {bits:>10}"
        )
    longest = max(evaluations, key=lambda evaluation: evaluation.context_length)
    lines += ["", "loss (nats a token) at the positions of a context of"]
    lines.append(f"{'positions':>16}" + "".join(f"{evaluation.context_length:>10}" for evaluation in evaluations))
    # A shorter context's last bucket may end before the range does.
    by_first = [{bucket.first: bucket for bucket in evaluation.buckets()} for evaluation in evaluations]
    for bucket in longest.buckets():
        cells = [buckets.get(bucket.first) for buckets in by_first]
        losses = "".join(f"{'-' if cell is None or cell.loss is None else f'{cell.loss:.4f}':>10}" for cell in cells)
        lines.append(f"{bucket.first:>8} ..{bucket.last:>5}" + losses)
    return "\n".join(lines)


def plot(evaluations: Sequence[Evaluation], path: pathlib.Path, *, trained_length: int) -> None:
    """Draws the loss by position, a curve for each context length; a line marks the length of training sequences."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for evaluation in evaluations:
        buckets = [bucket for bucket in evaluation.buckets(per_octave=4) if bucket.loss is not None]
        axes.plot(
            [bucket.middle for bucket in buckets],
            [bucket.loss for bucket in buckets],
            "o-",
            markersize=3,
            label=f"context {evaluation.context_length}: perplexity {evaluation.perplexity:.3f}",
        )
    axes.axvline(trained_length, color="gray", linestyle="--", linewidth=1, label=f"trained on {trained_length}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("position in the context, tokens")
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
