"""Continuations of the same context: it is read once, and each continuation goes on from its cache.

A question of T tokens with O options of M tokens each is read in T + O (M - 1) tokens instead of O (T + M - 1). What
many contexts begin with, such as examples that all questions of a task follow, is read once a batch. Layer by layer:
what one layer remembers of the contexts is all that is held at a time, and one layer is all that is compiled.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rat_jax.blocks import ResidualBlock
from rat_jax.evaluation.padding import padded_count, padded_length
from rat_jax.loss import token_scores
from rat_jax.mesh import constrain_rows, replicate
from rat_jax.mixers.base import MixerCache
from rat_jax.model import LanguageModel
from rat_jax.segments import SegmentInfo, StreamState, from_segments
from rat_jax.shapes import Array, Bool, Float, Float32, Int

_CHUNK = 1024  # tokens of a context read at a time
_SHORTEST_BEGINNING, _FEWEST_ALIKE = 64, 8  # tokens, and contexts, from which on a common beginning is read once
_SHORTEST_OPTION = 8  # tokens of a padded continuation, unless none of the batch needs any


class SharedContext(NamedTuple):
    """A context and what may follow it, each of at least one token."""

    ids: np.ndarray
    options: Sequence[np.ndarray]
    rows: Sequence[int]  # the caller's numbers of the options
    num_common: int = 0  # of `ids`, the first ones: read once for all contexts of a batch, which begin with them

    @property
    def beginning(self) -> bytes:
        """What contexts that are computed together have in common."""
        return self.ids[: self.num_common].tobytes()

    def num_tokens(self, context_length: int) -> int:
        """Tokens that are read, the beginning and padding included."""
        longest = max(len(option) - 1 for option in self.options)
        return self.num_common + _padded_context(self, context_length) + len(self.options) * _padded_option(longest)


class OptionScores(NamedTuple):
    """What a model says of each token of each continuation; see `TokenScores`."""

    log_probs: Float32[Array, "B O M"]
    greedy: Bool[Array, "B O M"]


class ContextBatch(NamedTuple):
    """B contexts with O continuations each; padding follows what it fills up."""

    beginning: Int[Array, "A P"] | np.ndarray  # tokens before those of every context, once for each device; P may be 0
    tokens: Int[Array, "B T"] | np.ndarray  # of the contexts, after their beginning
    num_tokens: Int[Array, " B"] | np.ndarray
    read: Int[Array, "B O U"] | np.ndarray  # continuations without their last tokens; U may be 0
    targets: Int[Array, "B O M"] | np.ndarray  # the continuations; M = U + 1


@dataclasses.dataclass(frozen=True)
class PlannedContexts:
    """Which contexts are computed together, and the shapes they are padded to."""

    contexts: list[int]
    num_contexts: int  # padding included
    num_devices: int
    num_common: int  # tokens that all of them begin with
    length: int  # of contexts, after these
    num_options: int  # of each
    option_length: int  # tokens that are read of a continuation

    @property
    def num_tokens(self) -> int:
        """Tokens that are read, padding included."""
        of_contexts = self.num_contexts * (self.length + self.num_options * self.option_length)
        return self.num_devices * self.num_common + of_contexts

    def batch(self, contexts: Sequence[SharedContext]) -> ContextBatch:
        """The arrays."""
        num_rows, num_options, length = self.num_contexts, self.num_options, self.option_length
        common = contexts[self.contexts[0]].ids[: self.num_common]
        batch = ContextBatch(
            beginning=np.tile(common.astype(np.int32), (self.num_devices, 1)),
            tokens=np.zeros((num_rows, self.length), np.int32),
            num_tokens=np.ones(num_rows, np.int32),
            read=np.zeros((num_rows, num_options, length), np.int32),
            targets=np.zeros((num_rows, num_options, length + 1), np.int32),
        )
        for place, index in enumerate(self.contexts):
            ids, options = contexts[index].ids[self.num_common :], contexts[index].options
            batch.tokens[place, : len(ids)] = ids
            batch.num_tokens[place] = len(ids)
            for number, option in enumerate(options):
                batch.read[place, number, : len(option) - 1] = option[:-1]
                batch.targets[place, number, : len(option)] = option
        return batch


def plan_contexts(
    contexts: Sequence[SharedContext], context_length: int, batch_tokens: int, num_devices: int
) -> list[PlannedContexts]:
    """Contexts with equally many continuations, the same beginning and similar length together, in few shapes.

    Args:
      contexts: to plan.
      context_length: no context with a continuation is longer.
      batch_tokens: what the tokens of a batch stay below, unless one context for each device is more.
      num_devices: what the contexts of a batch are a multiple of.
    """
    plan = []
    counts = [len(context.options) for context in contexts]
    for num_options in sorted(set(counts)):
        alike = [index for index, count in enumerate(counts) if count == num_options]
        lengths = _option_lengths([max(len(option) - 1 for option in contexts[index].options) for index in alike])
        kinds = [(-length, contexts[index].beginning) for length, index in zip(lengths, alike, strict=True)]
        order = sorted(zip(kinds, alike, strict=True), key=lambda pair: (pair[0], -len(contexts[pair[1]].ids)))
        start = 0
        while start < len(order):
            kind, first = order[start]
            option_length, num_common = -kind[0], contexts[first].num_common
            length = _padded_context(contexts[first], context_length)
            per_device = max(1, (batch_tokens // num_devices - num_common) // (length + num_options * option_length))
            members = [i for other, i in order[start : start + per_device * num_devices] if other == kind]
            count = padded_count(-(-len(members) // num_devices), per_device) * num_devices
            plan.append(PlannedContexts(members, count, num_devices, num_common, length, num_options, option_length))
            start += len(members)
    return plan


def with_beginnings(contexts: Sequence[SharedContext]) -> list[SharedContext]:
    """The same, each with how many of its first tokens it has in common with others.

    Those that begin with the same 64 tokens are alike, where they are 8 or more: what all of them begin with is common,
    rounded down to few lengths, without the last token of any.
    """
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, context in enumerate(contexts):
        if len(context.ids) > _SHORTEST_BEGINNING:
            groups[context.ids[:_SHORTEST_BEGINNING].tobytes()].append(index)
    found = list(contexts)
    for members in groups.values():
        if len(members) < _FEWEST_ALIKE:
            continue
        first = contexts[members[0]].ids
        common = min(_num_equal(first, contexts[index].ids[:-1]) for index in members)
        unit = (1 << (common.bit_length() - 1)) // 4
        for index in members:
            found[index] = contexts[index]._replace(num_common=common // unit * unit)
    return found


def _num_equal(x: np.ndarray, y: np.ndarray) -> int:
    """How many first numbers two arrays have in common."""
    length = min(len(x), len(y))
    differ = x[:length] != y[:length]
    return int(np.argmax(differ)) if differ.any() else length


def _option_lengths(needed: Sequence[int]) -> list[int]:
    """What the continuations of each context are padded to: one length for nine of ten contexts, one for the others.

    Args:
      needed: tokens to read of each context's longest continuation.
    """
    usual, longest = (_padded_option(int(np.quantile(needed, part, method="higher"))) for part in (0.9, 1.0))
    return [usual if need <= usual else longest for need in needed]


def _padded_context(context: SharedContext, context_length: int) -> int:
    """Of what follows the beginning; two lengths an octave, since those of options make shapes enough."""
    return padded_length(len(context.ids) - context.num_common, context_length - context.num_common, per_octave=2)


def _padded_option(num_tokens: int) -> int:
    return 0 if num_tokens == 0 else max(_SHORTEST_OPTION, 1 << (num_tokens - 1).bit_length())


@functools.partial(jax.jit, static_argnames="graphdef")
def context_scores(graphdef: nnx.GraphDef, params: nnx.State, batch: ContextBatch) -> OptionScores:
    """What a model says of every token of every continuation.

    Args:
      graphdef: of the model, from `nnx.split`.
      params: of the model, float32.
      batch: with contexts for all devices of the mesh in use, if any.
    """
    model = nnx.merge(graphdef, params)
    batch = constrain_rows(batch)
    num_rows, num_options, option_length = batch.read.shape
    read = batch.read.reshape(num_rows * num_options, option_length)
    is_plain = batch.beginning.shape[1] == option_length == 0
    context, options = (model.hidden(batch.tokens), None) if is_plain else _read_contexts(model, batch, read)
    last = jnp.take_along_axis(context, batch.num_tokens[:, None, None] - 1, axis=1)
    last = constrain_rows(jnp.broadcast_to(last, (num_rows, num_options, last.shape[-1])))
    first = token_scores(last, model.embedding[...], batch.targets[:, :, 0])
    if option_length == 0:
        return OptionScores(*(replicate(x[:, :, None]) for x in first))
    later = token_scores(options, model.embedding[...], batch.targets[:, :, 1:].reshape(read.shape))
    return OptionScores(
        *(
            replicate(jnp.concatenate([x[:, :, None], y.reshape(num_rows, num_options, option_length)], axis=-1))
            for x, y in zip(first, later, strict=True)
        )
    )


def _read_contexts(
    model: LanguageModel, batch: ContextBatch, read: Int[Array, "R U"]
) -> tuple[Float[Array, "B T D"], Float[Array, "R U D"]]:
    """The final norm's output for the tokens of the contexts, and for those that are read of their continuations.

    Each layer reads the beginning, the contexts and the continuations in turn, so that the memory of one layer is held
    at a time.
    """
    num_first, num_common = batch.beginning.shape
    num_rows, length = batch.tokens.shape
    num_options, option_length = batch.read.shape[1:]
    is_token = jnp.arange(length, dtype=jnp.int32)[None] < batch.num_tokens[:, None]
    first_chunks, stream = _chunks(jnp.ones_like(batch.beginning), StreamState.empty(num_first))
    chunks, stream = _chunks(is_token.astype(jnp.int32), _repeated(stream, num_rows // num_first))
    option_chunks, _ = _chunks(jnp.ones_like(read), _repeated(stream, num_options))

    def run(
        block: ResidualBlock, carry: tuple[Array, Array, Array], segments: tuple[list, list, list]
    ) -> tuple[Array, Array, Array]:
        (beginning, context, options), (first_chunks, chunks, option_chunks) = carry, segments
        memory = block.mixer.init_memory(num_first, num_common + length + option_length)
        beginning, memory = _read_chunks(block, beginning, first_chunks, memory)
        context, memory = _read_chunks(block, context, chunks, _repeated(memory, num_rows // num_first))
        options, _ = _read_chunks(block, options, option_chunks, _repeated(memory, num_options))
        return constrain_rows((beginning, context, options))

    embedded = constrain_rows(tuple(model.embed(tokens) for tokens in (batch.beginning, batch.tokens, read)))
    _, context, options = model.scan_layers(run, embedded, (first_chunks, chunks, option_chunks))
    return model.final_norm(context), model.final_norm(options)


def _chunks(segment_ids: Int[Array, "B T"], stream: StreamState) -> tuple[list[SegmentInfo], StreamState]:
    """The segments of tokens that are read _CHUNK at a time after those of `stream`, and where their rows end."""
    chunks = []
    for start in range(0, segment_ids.shape[1], _CHUNK):
        segments, stream = from_segments(segment_ids[:, start : start + _CHUNK], stream)
        chunks.append(segments)
    return chunks, stream


def _read_chunks(
    block: ResidualBlock, x: Float[Array, "B T D"], chunks: Sequence[SegmentInfo], memory: MixerCache
) -> tuple[Float[Array, "B T D"], MixerCache]:
    parts = [x[:, :0]]
    for number, segments in enumerate(chunks):
        part, memory = block(x[:, number * _CHUNK : (number + 1) * _CHUNK], segments, memory)
        parts.append(part)
    return jnp.concatenate(parts, axis=1), memory


def _repeated(tree: Any, times: int) -> Any:
    """Every row as many times, one after the other."""
    return constrain_rows(jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree))
