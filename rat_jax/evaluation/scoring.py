"""What a model says of given tokens: log-probabilities of continuations and of long texts, in few compiled shapes."""

import contextlib
import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import nnx

from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.progress import Progress, no_progress
from rat_jax.evaluation.row_batches import PlannedBatch, RowBatch, plan_batches
from rat_jax.evaluation.shared_contexts import (
    ContextBatch,
    OptionScores,
    PlannedContexts,
    SharedContext,
    context_scores,
    plan_contexts,
    with_beginnings,
)
from rat_jax.loss import TokenScores, token_scores
from rat_jax.memory import explaining_out_of_memory
from rat_jax.mesh import constrain_rows, replicate
from rat_jax.model import LanguageModel
from rat_jax.sharding import row_sharding

_MOST_OPTIONS = 16  # continuations of a context that are computed together

Ids = Sequence[int] | np.ndarray
Pair = tuple[Ids, Ids]  # a context, and its continuation


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model says of n tokens, each after all that come before it."""

    log_probs: np.ndarray  # float32 [n], in nats
    greedy: np.ndarray  # bool [n]: whether the token is the likeliest one
    num_dropped: int  # tokens of the context that were not read, since the context length has no room for them

    @property
    def total(self) -> float:
        """log p of all tokens together."""
        return float(self.log_probs.sum(dtype=np.float64))

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would give these tokens."""
        return bool(self.greedy.all())


@dataclasses.dataclass(frozen=True)
class _Row:
    name: str  # for messages
    ids: np.ndarray  # all but the last are read
    num_targets: int  # the last ones
    num_dropped: int

    @property
    def context(self) -> np.ndarray:
        return self.ids[: len(self.ids) - self.num_targets]

    @property
    def continuation(self) -> np.ndarray:
        return self.ids[len(self.ids) - self.num_targets :]


Planned = PlannedBatch | PlannedContexts


class Scorer:
    """Scores tokens with a model: rows of similar length together, cut among the devices of a mesh.

    Rows are sorted by length and padded to one of four lengths an octave, or short ones are packed into rows of one
    length, so that few programs are compiled (`rat_jax.evaluation.row_batches`). A score follows from its own tokens
    alone, up to rounding. Logits are held a block at a time (`rat_jax.loss`). A context that several continuations
    have, and what many contexts begin with, is read once where that is less to compute
    (`rat_jax.evaluation.shared_contexts`).
    """

    num_tokens = 0  # computed so far, padding included

    def __init__(self, model: LanguageModel, mesh: jax.sharding.Mesh | None, *, context_length: int, batch_tokens: int):
        """Computes nothing yet.

        Args:
          model: on the mesh, as `rat_jax.checkpoints.store.load_model` puts it.
          mesh: whose devices divide the rows; all hosts score the same tokens together. None: the model's own device.
          context_length: the most tokens that are read at a time; may exceed the length of training sequences.
          batch_tokens: tokens computed at a time, padding included, but one row for each device at least.

        Raises:
          EvaluationError: if a number is below 1.
        """
        for name, value in (("context_length", context_length), ("batch_tokens", batch_tokens)):
            if value < 1:
                raise EvaluationError(f"{name} must be 1 or more, got {value}")
        self.context_length = context_length
        self.batch_tokens = batch_tokens
        self._mesh = mesh
        self._vocab_size = model.config.vocab_size
        self._graphdef, self._params = nnx.split(model)

    def score(self, pairs: Sequence[Pair], progress: Progress = no_progress) -> list[Score]:
        """log p(token | context, earlier tokens of the continuation) of every token of each continuation.

        Of a context that is too long the end is read: `context_length` tokens up to the last but one of the
        continuation, of which the last is only predicted.

        Args:
          pairs: context and continuation, each of at least one id in [0, V). To start from nothing, give the id that
            ends documents as context.
          progress: wraps the batches, of which the number is given.

        Returns:
          A score for each pair, in their order.

        Raises:
          EvaluationError: naming a pair without context or continuation, with an id outside the vocabulary, with a
            continuation longer than `context_length`, or whose result is not finite; or too little memory.
        """
        rows = [self._pair_row(f"pair {index}", *pair) for index, pair in enumerate(pairs)]
        apart = self._plan_rows(rows, range(len(rows)))
        most = self.batch_tokens // self._num_devices
        contexts, alone = [], []
        for context in with_beginnings(_contexts_of(rows)):
            saves = len(context.rows) > 1 or context.num_common > 0
            if saves and context.num_tokens(self.context_length) <= most:
                contexts.append(context)
            else:
                alone += context.rows
        together = [
            *plan_contexts(contexts, self.context_length, self.batch_tokens, self._num_devices),
            *self._plan_rows(rows, alone),
        ]
        if sum(planned.num_tokens for planned in together) < sum(planned.num_tokens for planned in apart):
            return self._compute(together, rows, progress, contexts)
        return self._compute(apart, rows, progress)

    def score_rolling(self, documents: Sequence[Ids], start_id: int, progress: Progress = no_progress) -> list[Score]:
        """log p of every token of texts of any length, each token predicted once, in `rolling_windows`.

        Args:
          documents: ids in [0, V), at least one each.
          start_id: what the first token follows: the id that ends documents, or that of a BOS.
          progress: wraps the batches, of which the number is given.

        Returns:
          A score for each document, in their order.

        Raises:
          EvaluationError: as `score`, naming the document; or a `start_id` outside the vocabulary.
        """
        self._checked("start_id", [start_id])
        rows: list[_Row] = []
        num_windows = []
        for index, document in enumerate(documents):
            name = f"document {index}"
            if len(document) == 0:
                raise EvaluationError(f"{name} has no tokens: nothing to score")
            windows = list(rolling_windows(self._checked(name, document), start_id, self.context_length))
            rows += [_Row(name, np.concatenate(window), len(window[1]), 0) for window in windows]
            num_windows.append(len(windows))
        scores = iter(self._compute(self._plan_rows(rows, range(len(rows))), rows, progress))
        return [_joined([next(scores) for _ in range(count)]) for count in num_windows]

    def _pair_row(self, name: str, context: Ids, continuation: Ids) -> _Row:
        if len(context) == 0:
            raise EvaluationError(
                f"{name}: the context has no tokens: give at least one, such as the end of a document"
            )
        if len(continuation) == 0:
            raise EvaluationError(f"{name}: the continuation has no tokens: nothing to score")
        if len(continuation) > self.context_length:
            raise EvaluationError(
                f"{name}: the continuation has {len(continuation):,} tokens, more than the context length of "
                f"{self.context_length:,}: raise the context length, or score it in windows"
            )
        ids = np.concatenate(
            [self._checked(f"{name}, context", context), self._checked(f"{name}, continuation", continuation)]
        )
        num_dropped = max(0, len(ids) - 1 - self.context_length)
        return _Row(name, ids[num_dropped:], len(continuation), num_dropped)

    def _checked(self, name: str, ids: Ids) -> np.ndarray:
        ids = np.asarray(ids, np.int64)
        is_outside = (ids < 0) | (ids >= self._vocab_size)
        if is_outside.any():
            position = int(np.argmax(is_outside))
            raise EvaluationError(
                f"{name}, position {position}: token id {ids[position]} is outside the vocabulary of {self._vocab_size}"
            )
        return ids.astype(np.int32)

    @property
    def _num_devices(self) -> int:
        return 1 if self._mesh is None else self._mesh.size

    def _plan_rows(self, rows: Sequence[_Row], chosen: Sequence[int]) -> list[PlannedBatch]:
        lengths = [len(rows[index].ids) - 1 for index in chosen]
        plan = plan_batches(lengths, self.context_length, self.batch_tokens, self._num_devices)
        return [
            dataclasses.replace(planned, rows=[[chosen[place] for place in members] for members in planned.rows])
            for planned in plan
        ]

    def _compute(
        self,
        plan: Sequence[Planned],
        rows: Sequence[_Row],
        progress: Progress,
        contexts: Sequence[SharedContext] = (),
    ) -> list[Score]:
        def collect(planned: Planned, computed: TokenScores | OptionScores) -> None:
            log_probs, greedy = map(np.asarray, computed)
            for index, place in _places(planned, rows, contexts):
                scores[index] = _score(rows[index], log_probs[place], greedy[place])

        texts = [row.ids for row in rows]
        batches = (planned.batch(contexts if isinstance(planned, PlannedContexts) else texts) for planned in plan)
        scores: dict[int, Score] = {}
        under_way = None

        def too_large() -> EvaluationError:
            return EvaluationError(
                f"batches of {self.batch_tokens:,} tokens need more memory than is free; lower batch_tokens, or the "
                f"context length of {self.context_length:,}"
            )

        on_mesh = contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)
        with explaining_out_of_memory(too_large), on_mesh:
            for planned, batch in zip(plan, progress(batches, len(plan)), strict=True):
                compute = context_scores if isinstance(planned, PlannedContexts) else batch_scores
                started = planned, compute(self._graphdef, self._params, self._on_devices(batch))
                self.num_tokens += planned.num_tokens
                if under_way is not None:  # while the device computes
                    collect(*under_way)
                under_way = started
            if under_way is not None:
                collect(*under_way)
        return [scores[index] for index in range(len(rows))]

    def _on_devices(self, batch: RowBatch | ContextBatch) -> RowBatch | ContextBatch:
        if self._mesh is None:
            return batch
        sharding = row_sharding(self._mesh)  # every host has all rows and gives its devices theirs
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), batch)


@functools.partial(jax.jit, static_argnames="graphdef")
def batch_scores(graphdef: nnx.GraphDef, params: nnx.State, batch: RowBatch) -> TokenScores:
    """What a model says of every target of a batch.

    Args:
      graphdef: of the model, from `nnx.split`.
      params: of the model, float32.
      batch: with rows for all devices of the mesh in use, if any.
    """
    model = nnx.merge(graphdef, params)
    batch = constrain_rows(batch)
    hidden = constrain_rows(model.hidden(batch.tokens, batch.segment_ids))
    scores = token_scores(hidden, model.embedding[...], batch.targets)
    return TokenScores(*map(replicate, scores))


def rolling_windows(
    document: np.ndarray, start_id: int, context_length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Context and continuation of windows that predict each token of a document once.

    Each continuation is the next `context_length` tokens, or all that are left. Its context is the token before it
    (`start_id` before the first) and, where fewer are left, so many more that the window reads `context_length` tokens.
    A document that fits is one window.
    """
    ids = np.concatenate([np.asarray([start_id], document.dtype), document])
    for start in range(0, len(document), context_length):
        end = min(start + context_length, len(document))
        yield ids[max(0, end - context_length) : start + 1], ids[start + 1 : end + 1]


def _contexts_of(rows: Sequence[_Row]) -> list[SharedContext]:
    """Rows by their contexts; one that very many have comes several times."""
    members: dict[bytes, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        members[row.context.tobytes()].append(index)
    groups = [
        group[start : start + _MOST_OPTIONS]
        for group in members.values()
        for start in range(0, len(group), _MOST_OPTIONS)
    ]
    return [
        SharedContext(rows[group[0]].context, [rows[index].continuation for index in group], group) for group in groups
    ]


def _places(
    planned: Planned, rows: Sequence[_Row], contexts: Sequence[SharedContext]
) -> Iterator[tuple[int, tuple[int | slice, ...]]]:
    """Each row of a batch, and where its targets are in the batch's results."""
    if isinstance(planned, PlannedContexts):
        for place, context in enumerate(planned.contexts):
            for number, index in enumerate(contexts[context].rows):
                yield index, (place, number, slice(rows[index].num_targets))
    else:
        for place, members in enumerate(planned.rows):
            end = 0
            for index in members:
                end += len(rows[index].ids) - 1
                yield index, (place, slice(end - rows[index].num_targets, end))


def _score(row: _Row, log_probs: np.ndarray, greedy: np.ndarray) -> Score:
    if not np.isfinite(log_probs).all():
        raise EvaluationError(
            f"{row.name}: a log-probability is not finite: the model's parameters are damaged, or too large for its "
            f"dtype"
        )
    return Score(log_probs.copy(), greedy.copy(), row.num_dropped)


def _joined(scores: Sequence[Score]) -> Score:
    return Score(
        np.concatenate([score.log_probs for score in scores]), np.concatenate([score.greedy for score in scores]), 0
    )
