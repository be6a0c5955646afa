"""Continuations of the same context: it is read once, and each continuation goes on from its cache.

A question of T tokens with O options of M tokens each is read in T + O (M - 1) tokens instead of O (T + M - 1). Layer
by layer: what one layer remembers of the contexts is all that is held at a time, and one layer is all that is compiled.
"""

import dataclasses
import functools
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
from rat_jax.model import LanguageModel
from rat_jax.segments import StreamState, from_segments
from rat_jax.shapes import Array, Bool, Float, Float32, Int

_CHUNK = 1024  # tokens of a context read at a time
_SHORTEST_OPTION = 8  # tokens of a padded continuation, unless none of the batch needs any


class SharedContext(NamedTuple):
    """A context and what may follow it, each of at least one token."""

    ids: np.ndarray
    options: Sequence[np.ndarray]
    rows: Sequence[int]  # the caller's numbers of the options

    def num_tokens(self, context_length: int) -> int:
        """Tokens that are read, padding included."""
        longest = max(len(option) - 1 for option in self.options)
        return _padded_context(self, context_length) + len(self.options) * _padded_option(longest)


class OptionScores(NamedTuple):
    """What a model says of each token of each continuation; see `TokenScores`."""

    log_probs: Float32[Array, "B O M"]
    greedy: Bool[Array, "B O M"]


class ContextBatch(NamedTuple):
    """B contexts with O continuations each; padding follows what it fills up."""

    tokens: Int[Array, "B T"] | np.ndarray  # of the contexts
    num_tokens: Int[Array, " B"] | np.ndarray
    read: Int[Array, "B O U"] | np.ndarray  # continuations without their last tokens; U may be 0
    targets: Int[Array, "B O M"] | np.ndarray  # the continuations; M = U + 1


@dataclasses.dataclass(frozen=True)
class PlannedContexts:
    """Which contexts are computed together, and the shapes they are padded to."""

    contexts: list[int]
    num_contexts: int  # padding included
    length: int  # of contexts
    num_options: int  # of each
    option_length: int  # tokens that are read of a continuation

    @property
    def num_tokens(self) -> int:
        """Tokens that are read, padding included."""
        return self.num_contexts * (self.length + self.num_options * self.option_length)

    def batch(self, contexts: Sequence[SharedContext]) -> ContextBatch:
        """The arrays."""
        num_rows, num_options, length = self.num_contexts, self.num_options, self.option_length
        batch = ContextBatch(
            tokens=np.zeros((num_rows, self.length), np.int32),
            num_tokens=np.ones(num_rows, np.int32),
            read=np.zeros((num_rows, num_options, length), np.int32),
            targets=np.zeros((num_rows, num_options, length + 1), np.int32),
        )
        for place, index in enumerate(self.contexts):
            ids, options, _ = contexts[index]
            batch.tokens[place, : len(ids)] = ids
            batch.num_tokens[place] = len(ids)
            for number, option in enumerate(options):
                batch.read[place, number, : len(option) - 1] = option[:-1]
                batch.targets[place, number, : len(option)] = option
        return batch


def plan_contexts(
    contexts: Sequence[SharedContext], context_length: int, batch_tokens: int, num_devices: int
) -> list[PlannedContexts]:
    """Contexts with equally many continuations and of similar length together, the longest first, in few shapes.

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
        order = sorted(zip(lengths, alike, strict=True), key=lambda pair: (-pair[0], -len(contexts[pair[1]].ids)))
        start = 0
        while start < len(order):
            option_length, first = order[start]
            length = _padded_context(contexts[first], context_length)
            per_device = max(1, batch_tokens // ((length + num_options * option_length) * num_devices))
            members = [i for need, i in order[start : start + per_device * num_devices] if need == option_length]
            count = padded_count(-(-len(members) // num_devices), per_device) * num_devices
            plan.append(PlannedContexts(members, count, length, num_options, option_length))
            start += len(members)
    return plan


def _option_lengths(needed: Sequence[int]) -> list[int]:
    """What the continuations of each context are padded to: one length for nine of ten contexts, one for the others.

    Args:
      needed: tokens to read of each context's longest continuation.
    """
    usual, longest = (_padded_option(int(np.quantile(needed, part, method="higher"))) for part in (0.9, 1.0))
    return [usual if need <= usual else longest for need in needed]


def _padded_context(context: SharedContext, context_length: int) -> int:
    return padded_length(len(context.ids), context_length, per_octave=2)  # two kinds of length make shapes enough


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
    context, options = _read_contexts(model, batch, read) if option_length else (model.hidden(batch.tokens), None)
    last = jnp.take_along_axis(context, batch.num_tokens[:, None, None] - 1, axis=1)
    last = constrain_rows(jnp.broadcast_to(last, (num_rows, num_options, last.shape[-1])))
    first = token_scores(last, model.embedding[...], batch.targets[:, :, 0])
    if options is None:
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

    Each layer reads the contexts and then the continuations, so that the memory of one layer is held at a time.
    """
    num_rows, length = batch.tokens.shape
    num_options, option_length = batch.read.shape[1:]
    starts = range(0, length, _CHUNK)
    is_token = (jnp.arange(length, dtype=jnp.int32)[None] < batch.num_tokens[:, None]).astype(jnp.int32)
    chunks, stream = [], StreamState.empty(num_rows)
    for start in starts:
        segments, stream = from_segments(is_token[:, start : start + _CHUNK], stream)
        chunks.append(segments)
    option_segments, _ = from_segments(jnp.ones_like(read), _for_each_option(stream, num_options))

    def run(block: ResidualBlock, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        context, options = carry
        memory, parts = block.mixer.init_memory(num_rows, length + option_length), []
        for start, segments in zip(starts, chunks, strict=True):
            part, memory = block(context[:, start : start + _CHUNK], segments, memory)
            parts.append(part)
        options, _ = block(options, option_segments, _for_each_option(memory, num_options))
        return constrain_rows((jnp.concatenate(parts, axis=1), options))

    carry = constrain_rows((model.embed(batch.tokens), model.embed(read)))
    return jax.tree.map(model.final_norm, model.scan_layers(run, carry))


def _for_each_option(tree: Any, num_options: int) -> Any:
    return constrain_rows(jax.tree.map(lambda x: jnp.repeat(x, num_options, axis=0), tree))
