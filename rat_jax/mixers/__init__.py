"""Token mixers: the parts of a layer that move information between tokens.

One contract for all: `mixer(x, segments, cache=None) -> (y, cache)` with x and y [B, T, D]. Without a cache the tokens
start their rows (training, scoring); with one they follow those the cache has seen (prefill, chunked prefill, steps),
and the new cache comes back. `mixer.init_cache(batch_size, capacity)` makes an empty one.
"""

from flax import nnx

from rat_jax.config import ModelConfig
from rat_jax.mixers.attention import Attention, AttentionCache
from rat_jax.mixers.local_attention import LocalAttention, LocalAttentionCache
from rat_jax.mixers.rat import Rat
from rat_jax.mixers.rattention import Rattention, RattentionCache
from rat_jax.mixers.rnn import Rnn, RnnCache
from rat_jax.ops.rat_types import RatState

Mixer = Attention | LocalAttention | Rnn | Rat | Rattention
MixerCache = AttentionCache | LocalAttentionCache | RnnCache | RatState | RattentionCache


def make_mixer(kind: str, config: ModelConfig, rngs: nnx.Rngs) -> Mixer:
    """A new mixer of one of the kinds of `config.pattern`."""
    match kind:
        case "attention":
            return Attention(config, rngs=rngs)
        case "local_attention":
            return LocalAttention(config, rngs=rngs)
        case "rnn":
            return Rnn(config, rngs=rngs)
        case "rat":
            return Rat(config, rngs=rngs)
        case "rattention":
            return Rattention(config, rngs=rngs)
        case _:
            raise ValueError(f"no mixer is called {kind!r}")
