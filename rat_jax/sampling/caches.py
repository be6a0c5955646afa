"""How large caches are, and whether a device has room for them."""

import jax

from rat_jax.decoder import Decoder, ModelCache
from rat_jax.memory import tree_bytes

_SMALLEST_UNIT = 16  # tokens


def cache_capacity(num_tokens: int) -> int:
    """Room for `num_tokens`, in few sizes: a multiple of an eighth of the next power of two."""
    unit = max(_SMALLEST_UNIT, (1 << (num_tokens - 1).bit_length()) // 8)
    return -(-num_tokens // unit) * unit


def cache_bytes(decoder: Decoder, num_rows: int, capacity: int) -> int:
    """What a cache for `num_rows` of `capacity` tokens takes, without making it."""

    def make(arrays: list[jax.Array]) -> ModelCache:
        return decoder.layout.merge(arrays).init_cache(num_rows, capacity)

    return tree_bytes(jax.eval_shape(make, decoder.arrays))
