"""How well a model predicts the validation split: loss, perplexity, and the loss at each position of the context."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rat_jax.checkpoints.store import LoadedModel
from rat_jax.data.corpus import Corpus, Statistics
from rat_jax.data.pipeline import Batch, ValidationData
from rat_jax.errors import ConfigError
from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.position_sums import FIRST_BUCKET, Bucket, PositionSums, add, require_result
from rat_jax.evaluation.progress import Progress, no_progress
from rat_jax.loss import position_losses
from rat_jax.memory import explaining_out_of_memory, free_bytes, gib
from rat_jax.mesh import constrain_tokens, replicate
from rat_jax.model import LanguageModel
from rat_jax.sharding import (
    batch_sharding,
    check_tokens_divide,
    describe_axes,
    global_batch,
    num_row_parts,
    share_of_rows,
)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Loss of the validation split, or of an evenly spread part of it, in sequences of one length."""

    context_length: int
    fraction: float  # of the split's sequences; 1: the whole
    sums: PositionSums  # float64; position t is that of the t-th input token, whose target is the next one
    statistics: Statistics  # of the split
    first_target_id: int = 0  # of `DataConfig`: lower ids are no targets

    @property
    def num_targets(self) -> int:
        """Tokens that were predicted: of a document all but the first one, and its end."""
        return self.sums.num_targets

    @property
    def loss(self) -> float:
        """Mean over the targets, in nats a token."""
        return self.sums.mean()

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """nats of all targets / (ln 2 * bytes of the text they are of), as `Statistics.bits_per_byte` defines it."""
        return self.statistics.bits_per_byte(self.loss, self.first_target_id)

    def buckets(self, per_octave: int = 1) -> list[Bucket]:
        """Means over positions 0 .. 15, 16 .. 31, 32 .. 63, ...; from 16 on in `per_octave` parts of each range."""
        return self.sums.buckets(range(self.context_length + 1), bucket_edges(self.context_length, per_octave))

    def as_json(self) -> dict[str, Any]:
        """All figures, as values that JSON can hold."""
        return {
            "context_length": self.context_length,
            "split_fraction": self.fraction,
            "num_targets": self.num_targets,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "loss_by_position": [dataclasses.asdict(bucket) for bucket in self.buckets(per_octave=4)],
        }


@functools.partial(jax.jit, static_argnames="graphdef")
def position_sums(graphdef: nnx.GraphDef, params: nnx.State, batch: Batch) -> PositionSums:
    """Sums over rows of the weighted losses and of the weights, one for each position.

    Args:
      graphdef: of the model, from `nnx.split`.
      params: of the model, float32.
      batch: with rows for all devices of the mesh in use, if any.
    """
    model = nnx.merge(graphdef, params)
    hidden = constrain_tokens(model.hidden(constrain_tokens(batch.tokens), batch.segment_ids))
    losses = position_losses(hidden, model.embedding[...], batch.targets, batch.loss_weights)
    return replicate(PositionSums(losses, batch.loss_weights.sum(axis=0)))


def sum_losses(model: LanguageModel, batches: Iterable[Batch], mesh: jax.sharding.Mesh) -> PositionSums:
    """`position_sums` over all batches, added in float64.

    Args:
      model: on the mesh, as `rat_jax.checkpoints.store.load_model` puts it.
      batches: this host's rows, of one shape.
      mesh: whose devices divide the rows, and where it has such axes their tokens and the heads.

    Raises:
      EvaluationError: if nothing counts, or a loss is not finite.
    """
    graphdef, params = nnx.split(model)
    total, under_way = None, None
    with jax.set_mesh(mesh):
        for batch in batches:
            started = position_sums(graphdef, params, global_batch(batch, mesh))
            total = add(total, under_way)  # while the device computes
            under_way = started
    return require_result(add(total, under_way), str, model.config.dtype)


def evaluate(
    loaded: LoadedModel,
    corpus: Corpus,
    mesh: jax.sharding.Mesh,
    context_length: int,
    *,
    batch_tokens: int,
    max_batches: int | None,
    progress: Progress = no_progress,
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
      max_batches: as many sequences as fill so many batches, evenly spread over the split, as while training. None: the
        whole split.
      progress: wraps the batches, of which the number is given.

    Raises:
      DataError: if the data do not fit the model.
      EvaluationError: a setting out of range, more memory than there is, or no result.
    """
    if max_batches is not None and max_batches < 1:
        raise EvaluationError(f"max_batches must be 1 or more, got {max_batches}")
    check_fits(loaded, corpus, mesh, context_length, batch_tokens)
    config = dataclasses.replace(
        loaded.config.data,
        path=str(corpus.path),
        corpora={},
        seq_len=context_length,
        global_batch_size=_num_rows(mesh, context_length, batch_tokens),
        num_workers=0,
    )
    place, count = share_of_rows(mesh)
    hosts = {"process_index": place, "process_count": count}
    data = ValidationData(config, vocab_size=loaded.config.model.vocab_size, max_batches=max_batches, **hosts)
    with _out_of_memory_as_message(mesh, context_length, batch_tokens):
        sums = sum_losses(loaded.model, progress(data, len(data)), mesh)
    return Evaluation(context_length, data.fraction, sums, corpus.splits["validation"], config.first_target_id)


def check_fits(
    loaded: LoadedModel, corpus: Corpus, mesh: jax.sharding.Mesh, context_length: int, batch_tokens: int
) -> None:
    """Compiles what `evaluate` runs and checks that it has the memory it needs; what is out of the question at once.

    Raises:
      EvaluationError: a setting out of range, a context longer than the split, rows or heads that the mesh cannot cut,
        or more memory than a device has free.
    """
    check_length(corpus, context_length)
    if batch_tokens < 1:
        raise EvaluationError(f"batch_tokens must be 1 or more, got {batch_tokens}")
    try:
        check_tokens_divide(loaded.config.model, context_length, mesh, "it", "context")
    except ConfigError as error:
        raise EvaluationError(
            f"context length {context_length} on --mesh with {describe_axes(mesh)}: {error}"
        ) from None
    free = free_bytes(mesh.local_devices[0])
    if free is None:
        return
    needed = _least_bytes(loaded, mesh, context_length, batch_tokens)
    if needed <= free:
        with _out_of_memory_as_message(mesh, context_length, batch_tokens):  # some compilers refuse what cannot fit
            needed = _compiled_bytes(loaded, mesh, context_length, batch_tokens)
    if needed > free:
        what = f"at least {gib(needed)} on each device, which has {gib(free)} free"
        raise EvaluationError(_too_large(mesh, context_length, batch_tokens, what))


def check_length(corpus: Corpus, context_length: int) -> None:
    """Refuses a context of which the validation split does not hold one.

    Raises:
      EvaluationError: if it is longer than the split, has no tokens, or is not that of a corpus's rows of examples.
    """
    if context_length < 1:
        raise EvaluationError(f"context length must be 1 or more, got {context_length}")
    if corpus.examples is not None:
        if context_length != corpus.examples.seq_len:
            raise EvaluationError(
                f"{corpus.path} holds rows of {corpus.examples.seq_len} tokens, and cannot be read in sequences of "
                f"{context_length}: give {corpus.examples.seq_len}, or prepare the data with other rows"
            )
        return
    num_tokens = corpus.splits["validation"].num_tokens
    if context_length >= num_tokens:
        raise EvaluationError(
            f"context length {context_length:,} is longer than the validation split of {corpus.path}, which has "
            f"{num_tokens:,} tokens: the longest context with a next token is {num_tokens - 1:,}"
        )


def _out_of_memory_as_message(
    mesh: jax.sharding.Mesh, context_length: int, batch_tokens: int
) -> contextlib.AbstractContextManager[None]:
    return explaining_out_of_memory(
        lambda: EvaluationError(_too_large(mesh, context_length, batch_tokens, "more memory than is free"))
    )


def _least_bytes(loaded: LoadedModel, mesh: jax.sharding.Mesh, context_length: int, batch_tokens: int) -> int:
    """Activations of one layer that exist side by side whatever the compiler does: residual stream, norm, MLP."""
    model = loaded.config.model
    channels = 2 * model.width + model.mlp_hidden
    tokens = context_length * _num_rows(mesh, context_length, batch_tokens) // mesh.size
    return tokens * channels * jnp.dtype(model.dtype).itemsize


def _compiled_bytes(loaded: LoadedModel, mesh: jax.sharding.Mesh, context_length: int, batch_tokens: int) -> int:
    """What the compiler plans beside parameters and tokens: activations, scores of attention, logits."""
    shape = (_num_rows(mesh, context_length, batch_tokens), context_length)
    integers = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
    weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(mesh))
    batch = Batch(integers, integers, weights, integers if loaded.config.data.segment_documents else None)
    with jax.set_mesh(mesh):
        planned = position_sums.lower(*nnx.split(loaded.model), batch).compile().memory_analysis()
    return planned.temp_size_in_bytes + planned.output_size_in_bytes


def _num_rows(mesh: jax.sharding.Mesh, context_length: int, batch_tokens: int) -> int:
    """Sequences of a batch: as many as `batch_tokens` hold, but one for each part that rows are cut into at least."""
    parts = num_row_parts(mesh)
    return max(1, batch_tokens // (context_length * parts)) * parts


def _too_large(mesh: jax.sharding.Mesh, context_length: int, batch_tokens: int, what: str) -> str:
    rows = _num_rows(mesh, context_length, batch_tokens)
    remedy = f"lower batch_tokens, now {batch_tokens:,}" if rows > num_row_parts(mesh) else "choose a shorter context"
    return f"context length {context_length:,}: batches of {rows:,} sequences need {what}; {remedy}"


def bucket_edges(context_length: int, per_octave: int) -> list[int]:
    """First positions of the buckets, and `context_length`."""
    edges, first = [0], FIRST_BUCKET
    while first < context_length:
        edges += [first + first * part // per_octave for part in range(per_octave)]
        first *= 2
    return [edge for edge in edges if edge < context_length] + [context_length]
