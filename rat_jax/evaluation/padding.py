"""Lengths that rows are padded to: few, so that few programs are compiled."""

_SHORTEST = 16  # tokens of a padded row


def padded_length(num_tokens: int, most: int) -> int:
    """A multiple of an eighth of the next power of two, four of them an octave; `most` at most."""
    unit = max(_SHORTEST, (1 << (num_tokens - 1).bit_length()) // 8)
    return min(-(-num_tokens // unit) * unit, most)


def padded_count(count: int, most: int) -> int:
    """A power of two, `most` at most."""
    return min(most, 1 << (count - 1).bit_length())
