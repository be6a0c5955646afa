"""Sizes that caches have: few, so that few programs are compiled."""

_SMALLEST_UNIT = 16  # tokens


def cache_capacity(num_tokens: int, per_octave: int = 4) -> int:
    """Room for `num_tokens`: one of `per_octave` sizes, a power of two, between a power of two and the next."""
    unit = max(_SMALLEST_UNIT, (1 << (num_tokens - 1).bit_length()) // (2 * per_octave))
    return -(-num_tokens // unit) * unit
