"""Token mixers: the parts of a layer that move information between tokens.

  layer = Rat(width=512, num_heads=8, chunk_size=16, rngs=nnx.Rngs(0))
  y = layer(x)                                    # [B, T, D] -> [B, T, D], each row one document
  y = layer(x, segment_ids=segment_ids)           # packed documents and padding
  cache = layer.init_cache(batch_size=2, capacity=1024)
  y, cache = layer.extend(x, cache)               # prefill, chunked prefill, single steps

`rat_jax.mixers.base` has the contract, which models use too. All that is peculiar to a kind of mixer is in its file; a
new kind is a new file and a line of `MIXERS`.
"""

from rat_jax.errors import require
from rat_jax.mixers.attention import Attention, AttentionConfig
from rat_jax.mixers.base import LayerCache, Mixer, MixerConfig, ModelShape
from rat_jax.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig
from rat_jax.mixers.local_attention import LocalAttention, LocalAttentionConfig
from rat_jax.mixers.rat import Rat, RatConfig
from rat_jax.mixers.rattention import Rattention, RattentionConfig
from rat_jax.mixers.rnn import Rnn, RnnConfig

__all__ = [
    "MIXERS",
    "Attention",
    "AttentionConfig",
    "GatedDeltaNet",
    "GatedDeltaNetConfig",
    "LayerCache",
    "LocalAttention",
    "LocalAttentionConfig",
    "Mixer",
    "MixerConfig",
    "ModelShape",
    "Rat",
    "RatConfig",
    "Rattention",
    "RattentionConfig",
    "Rnn",
    "RnnConfig",
    "kind_of",
]

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "local_attention": LocalAttention,
    "rnn": Rnn,
    "rat": Rat,
    "rattention": Rattention,
    "gated_deltanet": GatedDeltaNet,
}


def kind_of(config: MixerConfig) -> str:
    """The kind of mixer that a config is of.

    Raises:
      ConfigError: if it is no kind's, or that of several, which then cannot be told apart.
    """
    kinds = [kind for kind, mixer in MIXERS.items() if mixer.Config is type(config)]
    require(isinstance(config, MixerConfig) and len(kinds) > 0, f"{config!r} is not the config of a mixer")
    require(
        len(kinds) == 1, f"{', '.join(kinds)} share {type(config).__name__}: each kind has a config class of its own"
    )
    return kinds[0]
