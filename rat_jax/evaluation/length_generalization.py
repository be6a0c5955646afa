"""Loss by position up to a multiple of the training length: sequences are read in chunks, with the mixers' caches.

One program reads a chunk of every row of a batch and adds its losses to sums by position, on the device; it has one
shape whatever the length. What grows with the length is the cache: by each token for `attention`, by each chunk of
`rat.chunk_size` tokens for `rat`, not at all for `local_attention`, `rattention`, `rnn` and `gated_deltanet`. Beside it
memory is flat: the first two take queries in blocks (`rat_jax.ops.attention`), fewer at a time the longer the cache is,
down to 16.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rat_jax.checkpoints.store import LoadedModel
from rat_jax.data.corpus import Corpus
from rat_jax.data.pipeline import Batch, ValidationData
from rat_jax.decoder import DecoderLayout, ModelCache
from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.perplexity import check_length
from rat_jax.evaluation.position_sums import FIRST_BUCKET, Bucket, PositionSums, add, require_result
from rat_jax.evaluation.progress import Progress, no_progress
from rat_jax.loss import token_scores
from rat_jax.memory import explaining_out_of_memory, free_bytes, gib
from rat_jax.mesh import constrain_rows, replicate
from rat_jax.model import LanguageModel
from rat_jax.shapes import Array, Float32, Int
from rat_jax.sharding import global_batch

CHUNK_TOKENS = 1024  # of a row, read in one call
_PER_OCTAVE = 4  # buckets


class Chunk(NamedTuple):
    """Neighbouring tokens of every row."""

    tokens: Int[Array, "B T"] | np.ndarray
    targets: Int[Array, "B T"] | np.ndarray  # the token after each
    loss_weights: Float32[Array, "B T"] | np.ndarray
    segment_ids: Int[Array, "B T"] | np.ndarray  # 0 past the end of the rows
    buckets: Int[Array, "B T"] | np.ndarray  # of each token's position


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reading:
    """How far the rows of a batch have been read."""

    cache: ModelCache
    sums: PositionSums


@dataclasses.dataclass(frozen=True)
class LengthGeneralization:
    """Loss of the validation split by position, in sequences longer than those of the training."""

    trained_length: int
    context_length: int
    positions: Literal["row", "document"]  # what positions are counted from the start of
    fraction: float  # of the split's sequences; 1: the whole
    chunk_tokens: int
    cache_bytes: tuple[int, int]  # of one row, of the training length and of this one
    edges: tuple[int, ...]  # first positions of the buckets, and the context length
    sums: PositionSums  # float64

    @property
    def num_targets(self) -> int:
        """Tokens that were predicted."""
        return self.sums.num_targets

    @property
    def loss(self) -> float:
        """Mean over all targets, in nats a token."""
        return self.sums.mean()

    @property
    def loss_within(self) -> float | None:
        """Mean over the targets at positions below the training length; None where there is none."""
        return self.sums.mean(0, self._num_within)

    @property
    def loss_beyond(self) -> float | None:
        """Mean over the targets at positions from the training length on; None where there is none."""
        return self.sums.mean(self._num_within)

    @property
    def _num_within(self) -> int:
        return self.edges.index(min(self.trained_length, self.context_length))

    def buckets(self, per_octave: Literal[1, 2, 4] = _PER_OCTAVE) -> list[Bucket]:
        """Means over ranges of positions, which `bucket_edges` of so many an octave bound."""
        return self.sums.buckets(self.edges, bucket_edges(self.trained_length, self.context_length, per_octave))

    def as_json(self) -> dict[str, Any]:
        """All figures, as values that JSON can hold."""
        return {
            "trained_length": self.trained_length,
            "context_length": self.context_length,
            "positions": self.positions,
            "split_fraction": self.fraction,
            "chunk_tokens": self.chunk_tokens,
            "cache_bytes": dict(zip(("trained_length", "context_length"), self.cache_bytes, strict=True)),
            "num_targets": self.num_targets,
            "loss": self.loss,
            "loss_within": self.loss_within,
            "loss_beyond": self.loss_beyond,
            "loss_by_octave": [dataclasses.asdict(bucket) for bucket in self.buckets(1)],
            "loss_by_position": [dataclasses.asdict(bucket) for bucket in self.buckets()],
        }


def bucket_edges(trained_length: int, context_length: int, per_octave: int) -> list[int]:
    """First positions of the buckets, and `context_length`.

    Octaves are T 2^i .. T 2^(i+1) of the training length T, each in `per_octave` equal parts; those below 16 positions
    are one bucket.
    """
    edges = {0, context_length, min(trained_length, context_length)}
    octave = -int(math.log2(max(1, trained_length / FIRST_BUCKET)))
    while (first := trained_length * 2.0**octave) < context_length:
        edges |= {round(first * (1 + part / per_octave)) for part in range(per_octave)}
        octave += 1
    return sorted(edge for edge in edges if edge <= context_length)


def measure(
    loaded: LoadedModel,
    corpus: Corpus,
    mesh: jax.sharding.Mesh,
    context_length: int,
    *,
    batch_tokens: int,
    max_batches: int | None,
    chunk_tokens: int = CHUNK_TOKENS,
    progress: Progress = no_progress,
) -> LengthGeneralization:
    """Loss by position of the validation split, cut in order into sequences of one length.

    Sequences are those of `rat_jax.evaluation.perplexity.evaluate`, and so are the losses, up to rounding. Where the
    model was trained with `data.segment_documents`, no mixer sees more than a token's document, and positions are
    counted from its start, or from that of the sequence where the document began before it.

    Args:
      loaded: the model, on the mesh.
      corpus: whose tokenizer is the model's.
      mesh: of the devices.
      context_length: tokens of a sequence.
      batch_tokens: tokens computed at a time: a chunk of each row of a batch, one row for each device at least.
      max_batches: as many sequences as fill so many batches, evenly spread over the split. None: the whole split.
      chunk_tokens: of a row; the result does not depend on it, up to rounding.
      progress: wraps the batches, of which the number is given.

    Raises:
      DataError: if the data do not fit the model.
      EvaluationError: a setting out of range, more memory than there is, or no result.
    """
    for name, value in (("batch_tokens", batch_tokens), ("chunk_tokens", chunk_tokens), ("max_batches", max_batches)):
        if value is not None and value < 1:
            raise EvaluationError(f"{name} must be 1 or more, got {value}")
    check_length(corpus, context_length)
    chunk_tokens = min(chunk_tokens, context_length)
    trained = loaded.config.data
    num_rows = _num_rows(corpus, mesh, context_length, chunk_tokens, batch_tokens)
    config = dataclasses.replace(
        trained, path=str(corpus.path), corpora={}, seq_len=context_length, global_batch_size=num_rows, num_workers=0
    )
    data = ValidationData(config, vocab_size=loaded.config.model.vocab_size, max_batches=max_batches)
    edges = bucket_edges(trained.seq_len, context_length, _PER_OCTAVE)

    def too_large(need: str) -> EvaluationError:
        remedy = f"lower batch_tokens, now {batch_tokens:,}" if num_rows > mesh.size else "choose a shorter context"
        return EvaluationError(
            f"context length {context_length:,}: to read batches of {num_rows:,} sequences takes {need}; {remedy}"
        )

    with explaining_out_of_memory(lambda: too_large("more memory than is free")), jax.set_mesh(mesh):
        reader = Reader(loaded.model, context_length, edges, chunk_tokens)
        needed, free = num_rows // mesh.size * reader.cache_bytes(context_length), free_bytes(mesh.local_devices[0])
        if free is not None and needed > free:
            raise too_large(f"caches of {gib(needed)} on each device, which has {gib(free)} free")
        sums = functools.reduce(add, (reader.sums(batch, mesh) for batch in progress(data, len(data))), None)
    return LengthGeneralization(
        trained_length=trained.seq_len,
        context_length=context_length,
        positions="document" if trained.segment_documents else "row",
        fraction=data.fraction,
        chunk_tokens=chunk_tokens,
        cache_bytes=(reader.cache_bytes(trained.seq_len), reader.cache_bytes(context_length)),
        edges=tuple(edges),
        sums=require_result(sums, lambda index: f"{edges[index]} or soon after", loaded.config.model.dtype),
    )


class Reader:
    """Reads batches of long rows, chunk by chunk."""

    def __init__(self, model: LanguageModel, context_length: int, edges: list[int], chunk_tokens: int):
        """Lays the model out for reading, under the mesh in use.

        Args:
          model: on the mesh.
          context_length: tokens of a row.
          edges: of the buckets, from `bucket_edges`.
          chunk_tokens: of a row, read in one call; at most `context_length`.
        """
        self._decoder = model.decoder()
        self.embedding = model.embedding[...]
        self.context_length, self.chunk_tokens = context_length, chunk_tokens
        self._edges = edges

    def cache_bytes(self, capacity: int) -> int:
        """Of one row of so many tokens."""
        return self._decoder.cache_bytes(1, capacity)

    def sums(self, batch: Batch, mesh: jax.sharding.Mesh) -> PositionSums:
        """Sums over a batch of this host's rows, one for each bucket."""
        num_rows = batch.tokens.shape[0] * jax.process_count()
        layout, arrays = self._decoder.layout, self._decoder.arrays
        reading = start_reading(layout, arrays, num_rows, self.context_length, len(self._edges) - 1)
        for chunk in chunks(batch, self._edges, self.chunk_tokens):
            reading = read_chunk(layout, arrays, self.embedding, global_batch(chunk, mesh), reading)
        return reading.sums


def chunks(batch: Batch, edges: list[int], chunk_tokens: int) -> Iterable[Chunk]:
    """A batch of rows in chunks of one shape, the last one padded."""
    num_tokens = batch.tokens.shape[1]
    segment_ids = np.ones_like(batch.tokens) if batch.segment_ids is None else batch.segment_ids
    whole = Chunk(
        batch.tokens, batch.targets, batch.loss_weights, segment_ids, _buckets(positions_of(segment_ids), edges)
    )
    padding = -num_tokens % chunk_tokens
    whole = Chunk(*(np.pad(x, ((0, 0), (0, padding))) for x in whole))
    for start in range(0, num_tokens, chunk_tokens):
        yield Chunk(*(np.ascontiguousarray(x[:, start : start + chunk_tokens]) for x in whole))


def positions_of(segment_ids: np.ndarray) -> np.ndarray:
    """Positions in the segments of rows [B, T], counted from the first token of a segment in its row."""
    indices = np.broadcast_to(np.arange(segment_ids.shape[1]), segment_ids.shape)
    starts = np.ones(segment_ids.shape, bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return indices - np.maximum.accumulate(np.where(starts, indices, 0), axis=1)


def _buckets(positions: np.ndarray, edges: list[int]) -> np.ndarray:
    return (np.searchsorted(edges, positions, side="right") - 1).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("layout", "num_rows", "capacity", "num_buckets"))
def start_reading(
    layout: DecoderLayout, arrays: list[Array], num_rows: int, capacity: int, num_buckets: int
) -> Reading:
    """Before the first chunk: an empty cache for rows of `capacity` tokens, sums of zero.

    Args:
      layout: of a `Decoder`.
      arrays: of the decoder.
      num_rows: of a batch, over all devices.
      capacity: tokens of a row.
      num_buckets: of positions.
    """
    cache = layout.merge(arrays).init_cache(num_rows, capacity)
    zeros = jnp.zeros((num_buckets,), jnp.float32)
    return Reading(constrain_rows(cache), PositionSums(replicate(zeros), replicate(zeros)))


@functools.partial(jax.jit, static_argnames="layout", donate_argnames="reading")
def read_chunk(
    layout: DecoderLayout, arrays: list[Array], embedding: Float32[Array, "V D"], chunk: Chunk, reading: Reading
) -> Reading:
    """Reads the next chunk of every row, and adds its losses to the sums.

    Args:
      layout: of a `Decoder`.
      arrays: of the decoder.
      embedding: of the model, with which logits are made a block at a time.
      chunk: of all rows.
      reading: of the chunks before; is donated.
    """
    module = layout.merge(arrays)
    hidden, cache = module.hidden(constrain_rows(chunk.tokens), reading.cache, constrain_rows(chunk.segment_ids))
    log_probs = token_scores(constrain_rows(hidden), embedding, chunk.targets).log_probs
    in_bucket = chunk.buckets[None] == jnp.arange(reading.sums.loss.shape[0])[:, None, None]

    def by_bucket(x):
        return replicate(jnp.sum(jnp.where(in_bucket, x[None], 0.0), axis=(1, 2)))

    new = PositionSums(by_bucket(-log_probs * chunk.loss_weights), by_bucket(chunk.loss_weights))
    return Reading(constrain_rows(cache), jax.tree.map(jnp.add, reading.sums, new))


def _num_rows(
    corpus: Corpus, mesh: jax.sharding.Mesh, context_length: int, chunk_tokens: int, batch_tokens: int
) -> int:
    """Sequences of a batch: as many as `batch_tokens` hold chunks, one for each device at least, none too many."""
    num_records = -(-(corpus.splits["validation"].num_tokens - 1) // context_length)
    return min(max(1, batch_tokens // (chunk_tokens * mesh.size)), -(-num_records // mesh.size)) * mesh.size
