"""The language model: embedding, residual blocks in a repeating pattern of mixers, norm, logits."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rat_jax.blocks import Mlp, ResidualBlock
from rat_jax.config import ModelConfig
from rat_jax.decoder import Decoder, DecoderModule, ModelCache, tied_logits
from rat_jax.layer_loop import Carry, run_layers
from rat_jax.layers import INITIAL_STD, RmsNorm
from rat_jax.memory import tree_bytes
from rat_jax.mixers import MIXERS
from rat_jax.ops import cut
from rat_jax.ops.remat import saving_named
from rat_jax.parameters import VECTOR, ParameterSpec
from rat_jax.segments import as_segments, check_tokens
from rat_jax.shapes import Array, Float, Float32, Int


class LanguageModel(nnx.Module):
    """Decoder-only language model whose layers repeat `config.pattern`.

    The layers of one element of the pattern are one `ResidualBlock` whose parameters have a leading axis over the
    repetitions; a loop runs over it, so that the time to compile does not grow with depth. Parameters are float32.
    The module is a container: split it once (`nnx.split`), use plain JAX transforms, merge inside.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Param(
            INITIAL_STD * jax.random.normal(rngs.params(), (config.vocab_size, config.width), jnp.float32)
        )
        self.blocks = nnx.Dict(
            {
                block_name(index, kind): _stacked(name, config, jax.random.split(rngs.params(), config.num_repeats))
                for index, (name, kind) in enumerate(zip(config.pattern, config.kinds, strict=True))
            }
        )
        self.final_norm = RmsNorm(config.width)

    def __call__(
        self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float32[Array, "B T V"]:
        """Logits of the token after each token.

        Args:
          tokens: ids in [0, V); others are not checked here.
          segment_ids: 0 is padding, which may lie before, after and between documents but not inside one; neighbours
            of the same other value are one document, across whose ends no mixer looks. None: each row is one document.
        """
        return self.logits(self.hidden(tokens, segment_ids))

    def hidden(self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
        """The final norm's output for each token, from which `logits` predicts the next."""
        check_tokens(tokens)
        segments = as_segments(segment_ids, tokens.shape)
        hidden = self.scan_layers(lambda block, x, segments: block(x, segments)[0], self.embed(tokens), segments)
        return self.final_norm(hidden)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float32[Array, "B T V"]:
        """hidden E^T with the embedding E; products in the compute dtype, sums in float32."""
        return tied_logits(hidden, self.embedding[...])

    def decoder(self) -> Decoder:
        """The model laid out to read tokens into caches, compiled; a copy of the parameters as they are now."""
        return Decoder(DecoderModule(self))

    def init_cache(self, batch_size: int, capacity: int) -> ModelCache:
        """An empty cache for rows of at most `capacity` tokens; errors as of `Mixer.init_cache`."""
        names = [block_name(place, kind) for place, kind in enumerate(self.config.kinds)] * self.config.num_repeats
        return ModelCache.empty([self.blocks[name].mixer for name in names], batch_size, capacity)

    def cache_bytes(self, batch_size: int, capacity: int) -> int:
        """Bytes of what `init_cache` makes, of its decoder too, without making it; errors as there."""
        return tree_bytes(jax.eval_shape(lambda: self.init_cache(batch_size, capacity)))

    def extend(
        self, tokens: Int[Array, "B T"], cache: ModelCache, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float32[Array, "B T V"], ModelCache]:
        """As `Decoder.extend`, for use inside a compiled function; it lays the model out anew each time."""
        hidden, cache = DecoderModule(self).hidden(tokens, cache, segment_ids)
        return self.logits(hidden), cache

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What the first layer reads."""
        embedding = self.embedding[...]
        if cut.is_cut():  # left to the partitioner, the embedded tokens would be made whole on every device
            return cut.run(_look_up, ("V", "BT"), "BT", embedding.astype(self.config.dtype), tokens)
        return embedding[tokens].astype(self.config.dtype)

    def decoding_layer(self, index: int) -> ResidualBlock:
        """Layer `index` by itself, operands of matrix products in the compute dtype."""
        repeat, place = divmod(index, len(self.config.pattern))
        name = block_name(place, self.config.kinds[place])
        graphdef, state = nnx.split(self.blocks[name])
        one = jax.tree.map(lambda stack: stack[repeat], state)
        return nnx.merge(graphdef, cast_operands(one, self.config.dtype, ("blocks", name)))

    def scan_layers(self, run: Callable[[ResidualBlock, Carry, Any], Carry], carry: Carry, shared: Any) -> Carry:
        """`run(block, carry, shared)` of each layer's block in turn; values are kept or computed again as `remat` says.

        Args:
          run: returns arrays of the shapes and dtypes of those it is given. It reads no other arrays that are traced.
          carry: what the first layer is given.
          shared: what every layer reads, a tree of arrays without gradients.
        """
        parts = [nnx.split(block) for _, block in sorted(self.blocks.items())]
        graphdefs, states = [part[0] for part in parts], [part[1] for part in parts]

        def run_pattern(carry, states, shared):
            for graphdef, state in zip(graphdefs, states, strict=True):
                run_one = _remat(
                    lambda state, carry, graphdef=graphdef: run(nnx.merge(graphdef, state), carry, shared), self.config
                )
                carry = run_one(state, carry)
            return carry

        return run_layers(run_pattern, carry, states, shared, self.config.scan_unroll)


def cast_operands(params: nnx.State, dtype: jax.typing.DTypeLike, inside: tuple[str, ...] = ()) -> nnx.State:
    """Parameters with the operands of the blocks' matrix products in `dtype`; `inside` is where in a model they are."""
    flat = []
    for path, param in nnx.to_flat_state(params):
        name = (*inside, *path)
        is_operand = name[0] == "blocks" and parameter_spec(".".join(name)).matmul
        flat.append((path, param.replace(param[...].astype(dtype)) if is_operand else param))
    return nnx.from_flat_state(flat)


def block_name(index: int, kind: str) -> str:
    """Name of the stacked block of an element of the pattern, in `LanguageModel.blocks` and in checkpoints."""
    return f"{index:02d}_{kind}"


_BLOCK_NAME = re.compile(r"(?:^|\.)blocks\.\d+_(?P<kind>\w+)\.(?P<name>.+)$")
_OWN_PARAMETERS = {"embedding": ParameterSpec(("vocab", "width"), matmul=True), "final_norm.scale": VECTOR}


def parameter_spec(name: str) -> ParameterSpec:
    """What a parameter says of itself, the axis of stacked layers left out.

    Args:
      name: as in checkpoints, `blocks.00_rat.mixer.in_proj.kernel` say; an optimizer's state may put more in front.

    Raises:
      ValueError: if no part of the model has such a parameter.
    """
    in_block = _BLOCK_NAME.search(name)
    if in_block is None:
        table, own = _OWN_PARAMETERS, next((own for own in _OWN_PARAMETERS if f".{name}".endswith(f".{own}")), name)
    else:
        kind, own = in_block["kind"], in_block["name"]
        part, _, inner = own.partition(".")
        match part:
            case "mixer" if kind in MIXERS:
                table, own = MIXERS[kind].PARAMETERS, inner
            case "mlp":
                table, own = Mlp.PARAMETERS, inner
            case _:
                table = ResidualBlock.NORMS
    if own not in table:
        raise ValueError(f"{name} is a parameter that no PARAMETERS table of the model's parts names")
    return table[own]


def _stacked(name: str, config: ModelConfig, keys: Array) -> ResidualBlock:
    """One block a key, their parameters stacked along a leading axis."""

    def make(key):
        return ResidualBlock(name, config, rngs=nnx.Rngs(key))

    graphdef = nnx.graphdef(nnx.eval_shape(make, keys[0]))
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(make(key)))(keys))


def _look_up(embedding: Array, tokens: Array) -> Array:
    """Rows of a vocabulary of which this device has a part."""
    count = embedding.shape[0]
    own = cut.own_ids(tokens, count)
    return cut.of_owner(embedding[own], own, count)


def _remat(run, config: ModelConfig):
    match config.remat:
        case "none":
            return run
        case "block":
            return jax.checkpoint(run)
        case "dots":
            return jax.checkpoint(run, policy=saving_named(jax.checkpoint_policies.dots_with_no_batch_dims_saveable))
