"""How large caches are, and whether a device has room for them."""

import jax
from flax import nnx

from rat_jax.decoder import ModelCache
from rat_jax.memory import tree_bytes

_SMALLEST_UNIT = 16  # tokens


def cache_capacity(num_tokens: int) -> int:
    """Room for `num_tokens`, in few sizes: a multiple of an eighth of the next power of two."""
    unit = max(_SMALLEST_UNIT, (1 << (num_tokens - 1).bit_length()) // 8)
    return -(-num_tokens // unit) * unit


def cache_bytes(graphdef: nnx.GraphDef, params: nnx.State, num_rows: int, capacity: int) -> int:
    """What a cache takes, without making it.

    Args:
      graphdef: of a `DecoderModule`.
      params: of the decoder.
      num_rows: of the cache.
      capacity: tokens a row.
    """

    def make(params: nnx.State) -> ModelCache:
        return nnx.merge(graphdef, params).init_cache(num_rows, capacity)

    return tree_bytes(jax.eval_shape(make, params))
