"""Lengths that rows are padded to: few, so that few programs are compiled."""

from rat_jax.sampling.caches import cache_capacity


def padded_length(num_tokens: int, most: int, per_octave: int = 4) -> int:
    """As large as a cache for so many tokens; `most` at most."""
    return min(cache_capacity(num_tokens, per_octave), most)


def padded_count(count: int, most: int) -> int:
    """A power of two, `most` at most."""
    return min(most, 1 << (count - 1).bit_length())
