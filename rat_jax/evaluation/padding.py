"""Lengths that rows are padded to: few, so that few programs are compiled."""

_SHORTEST = 16


def padded_length(num_tokens: int, most: int, per_octave: int = 4) -> int:
    """One of `per_octave` lengths, a power of two, between a power of two and the next; `most` at most."""
    unit = max(_SHORTEST, (1 << (num_tokens - 1).bit_length()) // (2 * per_octave))
    return min(-(-num_tokens // unit) * unit, most)


def padded_count(count: int, most: int) -> int:
    """A power of two, `most` at most."""
    return min(most, 1 << (count - 1).bit_length())
