"""The language model: embedding, residual blocks in a repeating pattern of mixers, norm, logits."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from rat_jax.blocks import ResidualBlock
from rat_jax.config import ModelConfig
from rat_jax.layers import INITIAL_STD, RmsNorm
from rat_jax.mixers import MixerCache
from rat_jax.ops.remat import saving_named
from rat_jax.segments import SegmentInfo, StreamState, from_segments, whole_rows
from rat_jax.shapes import Array, Float, Float32, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelCache:
    """What a model remembers of the rows it has read."""

    layers: tuple[MixerCache, ...]  # one for each layer, not stacked: a scan would copy them all at every step
    end: StreamState


class LanguageModel(nnx.Module):
    """Decoder-only language model whose layers repeat `config.pattern`.

    The layers that share a place in the pattern are one `ResidualBlock` whose parameters have a leading axis over the
    repetitions; `lax.scan` runs over it, so that the time to compile does not grow with depth. Parameters are float32.
    The module is a container: split it once (`nnx.split`), use plain JAX transforms, merge inside.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.num_repeats = config.num_layers // len(config.pattern)
        self.embedding = nnx.Param(
            INITIAL_STD * jax.random.normal(rngs.params(), (config.vocab_size, config.width), jnp.float32)
        )
        self.blocks = nnx.Dict(
            {
                block_name(place, kind): _stacked(kind, config, jax.random.split(rngs.params(), self.num_repeats))
                for place, kind in enumerate(config.pattern)
            }
        )
        self.final_norm = RmsNorm(config.width)

    def __call__(
        self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float32[Array, "B T V"]:
        """Logits of the token after each token.

        Args:
          tokens: ids in [0, V); others are not checked here.
          segment_ids: 0 is padding, neighbours of the same other value are one document, across whose ends no mixer
            looks; None: each row is one document.
        """
        return self.logits(self.hidden(tokens, segment_ids))

    def hidden(self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
        """The final norm's output for each token, from which `logits` predicts the next."""
        segments = whole_rows(*tokens.shape) if segment_ids is None else from_segments(segment_ids)[0]
        return self.final_norm(self._scan_layers(self._embed(tokens), segments))

    def logits(self, hidden: Float[Array, "B T D"]) -> Float32[Array, "B T V"]:
        """hidden E^T with the embedding E; products in the compute dtype, sums in float32."""
        return _logits(hidden, self.embedding)

    def init_cache(self, batch_size: int, capacity: int) -> ModelCache:
        """An empty cache for rows of at most `capacity` tokens."""
        return Decoder(self).init_cache(batch_size, capacity)

    def extend(
        self, tokens: Int[Array, "B T"], cache: ModelCache, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float32[Array, "B T V"], ModelCache]:
        """Reads tokens that follow those in the cache: a prompt, a part of one, or a single step.

        For many calls make a `Decoder` once: this makes one each time.

        Args:
          segment_ids: as in `__call__`; a row goes on with the document it stood in if the id is the same. Rows of
            different lengths are padded with 0, which changes no cache. None: all are tokens of document 1.

        Returns:
          The logits after each token (of no meaning at padding), and the cache with these tokens read.
        """
        hidden, cache = Decoder(self).extend(tokens, cache, segment_ids)
        return self.logits(hidden), cache

    def _embed(self, tokens: Array) -> Array:
        return _embed(tokens, self.embedding, self.config)

    def layer(self, index: int) -> ResidualBlock:
        """Layer `index` by itself."""
        place = index % len(self.config.pattern)
        block = self.blocks[block_name(place, self.config.pattern[place])]
        graphdef, state = nnx.split(block)
        return nnx.merge(graphdef, jax.tree.map(lambda x: x[index // len(self.config.pattern)], state))

    def _scan_layers(self, x: Array, segments: SegmentInfo) -> Array:
        parts = [nnx.split(block) for _, block in sorted(self.blocks.items())]
        graphdefs, states = [part[0] for part in parts], [part[1] for part in parts]

        def run_pattern(x, states):
            for graphdef, state in zip(graphdefs, states, strict=True):
                run = _remat(
                    lambda state, x, graphdef=graphdef: nnx.merge(graphdef, state)(x, segments)[0], self.config
                )
                x = run(state, x)
            return x, None

        return jax.lax.scan(run_pattern, x, states, unroll=min(self.config.scan_unroll, self.num_repeats))[0]


class Decoder(nnx.Module):
    """A `LanguageModel` laid out to read tokens into a cache: one block a layer, matrices in the compute dtype.

    Stacked float32 parameters would be cut and cast again at every step. Results are those of the model: its matrix
    products take place in the compute dtype too, and vectors (norm scales, gate biases) stay float32.
    """

    def __init__(self, model: LanguageModel):
        def cast(x: Array) -> Array:
            return x.astype(model.config.dtype) if x.ndim >= 2 else x

        self.config = model.config
        self.embedding = nnx.Param(cast(model.embedding[...]))
        parts = [nnx.split(model.layer(i)) for i in range(model.config.num_layers)]
        self.layers = nnx.List([nnx.merge(graphdef, jax.tree.map(cast, state)) for graphdef, state in parts])
        self.final_norm = model.final_norm

    def init_cache(self, batch_size: int, capacity: int) -> ModelCache:
        """An empty cache for rows of at most `capacity` tokens."""
        return ModelCache(
            layers=tuple(layer.mixer.init_cache(batch_size, capacity) for layer in self.layers),
            end=StreamState.empty(batch_size),
        )

    def extend(
        self, tokens: Int[Array, "B T"], cache: ModelCache, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], ModelCache]:
        """As `LanguageModel.extend`, but with the final norm's output, of which `logits` may take a part."""
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        segments, end = from_segments(segment_ids, cache.end)
        x = _embed(tokens, self.embedding, self.config)
        layer_caches = []
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x, layer_cache = layer(x, segments, layer_cache)
            layer_caches.append(layer_cache)
        return self.final_norm(x), ModelCache(layers=tuple(layer_caches), end=end)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float32[Array, "B T V"]:
        """As `LanguageModel.logits`."""
        return _logits(hidden, self.embedding)


def _embed(tokens: Array, embedding: nnx.Param, config: ModelConfig) -> Array:
    return embedding[...][tokens].astype(config.dtype)


def _logits(hidden: Array, embedding: nnx.Param) -> Array:
    return jnp.einsum("btd,vd->btv", hidden, embedding[...].astype(hidden.dtype), preferred_element_type=jnp.float32)


def block_name(place: int, kind: str) -> str:
    """Name of the stacked block at a place of the pattern, in `LanguageModel.blocks` and in checkpoints."""
    return f"{place:02d}_{kind}"


def _stacked(kind: str, config: ModelConfig, keys: Array) -> ResidualBlock:
    """One block a key, their parameters stacked along a leading axis."""

    def make(key):
        return ResidualBlock(kind, config, rngs=nnx.Rngs(key))

    graphdef = nnx.graphdef(nnx.eval_shape(make, keys[0]))
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(make(key)))(keys))


def _remat(run, config: ModelConfig):
    match config.remat:
        case "none":
            return run
        case "block":
            return jax.checkpoint(run)
        case "dots":
            return jax.checkpoint(run, policy=saving_named(jax.checkpoint_policies.dots_with_no_batch_dims_saveable))
