"""A language model laid out to read tokens into a cache."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from rat_jax.blocks import BlockInput
from rat_jax.memory import tree_bytes
from rat_jax.mixers.base import Mixer, MixerCache, check_cache_size, check_room, next_segments
from rat_jax.ops import NormedMatrix
from rat_jax.segments import SegmentInfo, StreamState, check_tokens
from rat_jax.shapes import Array, Float, Float32, Int

if TYPE_CHECKING:
    from rat_jax.model import LanguageModel

Memories = tuple[MixerCache, ...]  # one for each layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelCache:
    """What a model remembers of the rows it has read."""

    layers: tuple[MixerCache, ...]  # one for each layer, not stacked: a scan would copy them all at every step
    stream: StreamState
    capacity: int = dataclasses.field(metadata={"static": True})  # tokens a row

    @classmethod
    def empty(cls, mixers: Iterable[Mixer], batch_size: int, capacity: int) -> "ModelCache":
        """The cache of a model with a layer of each of these mixers, before the first token.

        Raises:
          ValueError: if either size is not 1 or more.
        """
        check_cache_size(batch_size, capacity)
        memories = tuple(mixer.init_memory(batch_size, capacity) for mixer in mixers)
        return cls(memories, StreamState.empty(batch_size), capacity)

    def take_rows(self, rows: Int[Array, " _"]) -> "ModelCache":
        """The cache of these rows, any of them several times: what several continuations of a prompt start from.

        Args:
          rows: numbers of rows, from 0 on; others are not checked.
        """
        return jax.tree.map(lambda x: x[rows], self)

    def at(self, position: Int[Array, ""]) -> "ModelCache":
        """The cache of rows that have read `position` tokens of one document, its numbers as they are.

        Measurements start in the middle of a row by it, without reading the tokens before.
        """
        ones = jnp.ones_like(self.stream.position)
        stream = StreamState(segment_id=ones, num_documents=ones, position=position * ones, num_tokens=position * ones)
        return dataclasses.replace(self, stream=stream)


class DecoderModule(nnx.Module):
    """One block a layer, matrices in the compute dtype: stacked float32 ones would be cut and cast at every step.

    Results are those of the model: its matrix products take place in the compute dtype too, and all other parameters
    (norm scales, gate biases) stay float32. A container: split it once, merge it inside compiled functions.
    """

    def __init__(self, model: "LanguageModel"):
        self.config = model.config
        self.embedding = nnx.Param(model.embedding[...].astype(model.config.dtype))
        self.layers = nnx.List([model.decoding_layer(index) for index in range(model.config.num_layers)])
        self.final_norm = model.final_norm

    def init_cache(self, batch_size: int, capacity: int) -> ModelCache:
        """An empty cache for rows of at most `capacity` tokens."""
        return ModelCache.empty([layer.mixer for layer in self.layers], batch_size, capacity)

    def hidden(
        self, tokens: Int[Array, "B T"], cache: ModelCache, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], ModelCache]:
        """As `Decoder.extend`, but with the final norm's output, of which `logits` may take a part."""
        check_tokens(tokens)
        segments, stream = next_segments(segment_ids, cache.stream, tokens.shape, cache.capacity)
        x = self.embedding[...][tokens].astype(self.config.dtype)
        run_layers = self._steps if tokens.shape[1] == 1 else self._layers
        x, memories = run_layers(x, segments, cache.layers)
        return self.final_norm(x), ModelCache(memories, stream, cache.capacity)

    def _layers(self, x: Array, segments: SegmentInfo, memories: Memories) -> tuple[Array, Memories]:
        """One layer after the other."""
        found = []
        for layer, memory in zip(self.layers, memories, strict=True):
            x, memory = _run_layer(*nnx.split(layer), x, segments, memory)
            found.append(memory)
        return x, tuple(found)

    def _steps(self, x: Array, segments: SegmentInfo, memories: Memories) -> tuple[Array, Memories]:
        """As `_layers`, of one token a row: each layer ends with the next one's first product."""
        given, found = BlockInput(x), []
        products = [layer.first_product for layer in self.layers]
        for layer, memory, following in zip(self.layers, memories, [*products[1:], None], strict=True):
            given, memory = _step_layer(*nnx.split(layer), given, segments, memory, following)
            found.append(memory)
        return given.x, tuple(found)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float32[Array, "B T V"]:
        """As `LanguageModel.logits`."""
        return tied_logits(hidden, self.embedding[...])

    def step_bytes(self, cache: ModelCache, position: int) -> int:
        """Bytes that a step at `position` reads at least of a cache (arrays or their shapes)."""
        return sum(
            layer.mixer.step_bytes(memory, position) for layer, memory in zip(self.layers, cache.layers, strict=True)
        )


@functools.partial(jax.jit, static_argnames="graphdef")
def _run_layer(
    graphdef: nnx.GraphDef, params: nnx.State, x: Array, segments: SegmentInfo, memory: MixerCache
) -> tuple[Array, MixerCache]:
    """A layer; compiled functions that call it trace and lower layers alike once, however many there are."""
    return nnx.merge(graphdef, params)(x, segments, memory)


@functools.partial(jax.jit, static_argnames="graphdef")
def _step_layer(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    given: BlockInput,
    segments: SegmentInfo,
    memory: MixerCache,
    following: NormedMatrix | None,
) -> tuple[BlockInput, MixerCache]:
    """As `_run_layer`, for `ResidualBlock.step`."""
    return nnx.merge(graphdef, params).step(given, segments, memory, following)


class DecoderLayout:
    """All of a decoder but its arrays: a static argument of compiled functions, of which equal decoders have one.

    A call compares and hashes its static arguments. This one is compared by identity: the graph of a model of 24 layers
    takes milliseconds to hash, as long as a step.
    """

    def __init__(self, graphdef: nnx.GraphDef, treedef: jax.tree_util.PyTreeDef):
        self._graphdef, self._treedef = graphdef, treedef

    def merge(self, arrays: list[Array]) -> DecoderModule:
        """The decoder of these arrays, in the order of `Decoder.arrays`; use it inside compiled functions."""
        return nnx.merge(self._graphdef, self._treedef.unflatten(arrays))


_layout = functools.lru_cache(maxsize=64)(DecoderLayout)


class Decoder:
    """A model that reads tokens into a cache, compiled: once for every shape of the tokens and of the cache.

    `LanguageModel.decoder` makes it, with one copy of the matrices in the compute dtype.
    """

    def __init__(self, module: DecoderModule):
        self.config = module.config
        graphdef, params = nnx.split(module)
        self.arrays, treedef = jax.tree.flatten(params)
        self.layout = _layout(graphdef, treedef)

    def init_cache(self, batch_size: int, capacity: int) -> ModelCache:
        """An empty cache for rows of at most `capacity` tokens; errors as of `Mixer.init_cache`."""
        check_cache_size(batch_size, capacity)
        return _init_cache(self.layout, self.arrays, batch_size, capacity)

    def cache_bytes(self, batch_size: int, capacity: int) -> int:
        """Bytes of what `init_cache` makes, without making it; errors as there."""
        check_cache_size(batch_size, capacity)
        return tree_bytes(jax.eval_shape(lambda: self.layout.merge(self.arrays).init_cache(batch_size, capacity)))

    def extend(
        self, tokens: Int[Array, "B T"], cache: ModelCache, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float32[Array, "B T V"], ModelCache]:
        """Reads tokens that follow those in the cache: a prompt, a part of one, or a single step.

        Args:
          tokens: ids in [0, V); others are not checked here.
          cache: from `init_cache` or an earlier call; it stays valid.
          segment_ids: 0 is padding, which may lie before, after and between documents but not inside one; neighbours
            of the same other value are one document; a row continues its document if the id is the same. Rows of
            different lengths are padded with 0, which changes no cache. None: all are tokens of document 1.

        Returns:
          The logits after each token (of no meaning at padding), and the cache with these tokens read.

        Raises:
          ValueError: if tokens are not whole numbers [B, T], the rows are not the cache's, or the call alone has more
            tokens than the cache has room for. Calls that fill it together beyond that are not noticed: what does not
            fit is not remembered.
        """
        check_tokens(tokens)
        check_room(segment_ids, cache.stream, tokens.shape, cache.capacity)
        return _extend(self.layout, self.arrays, tokens, cache, segment_ids)


@functools.partial(jax.jit, static_argnames=("layout", "batch_size", "capacity"))
def _init_cache(layout: DecoderLayout, arrays: list[Array], batch_size: int, capacity: int) -> ModelCache:
    return layout.merge(arrays).init_cache(batch_size, capacity)


@functools.partial(jax.jit, static_argnames="layout")
def _extend(
    layout: DecoderLayout, arrays: list[Array], tokens: Array, cache: ModelCache, segment_ids: Array | None
) -> tuple[Array, ModelCache]:
    module = layout.merge(arrays)
    hidden, cache = module.hidden(tokens, cache, segment_ids)
    return module.logits(hidden), cache


def tied_logits(hidden: Float[Array, "B T D"], embedding: Float[Array, "V D"]) -> Float32[Array, "B T V"]:
    """hidden E^T; products in the dtype of `hidden`, sums in float32."""
    return jnp.einsum("btd,vd->btv", hidden, embedding.astype(hidden.dtype), preferred_element_type=jnp.float32)
