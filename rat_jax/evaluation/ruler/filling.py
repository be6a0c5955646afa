"""How large a text may be to fill a context."""

from collections.abc import Callable

_CLOSE = 0.005  # of the limit: what may stay free without a further look


class TooShortError(Exception):
    """Not even the least size fits; holds the tokens that it has."""

    def __init__(self, num_tokens: int):
        super().__init__(num_tokens)
        self.num_tokens = num_tokens


def largest_fit(count: Callable[[int], int], limit: int, *, least: int) -> int:
    """The largest size with count(size) <= limit, or one that leaves less than 0.5 % of the limit free.

    Found between sizes that fit and sizes that do not, by the line through them, and by halving where that gets stuck.

    Args:
      count: tokens of a size, which grow with it, nearly in proportion, and without bound.
      limit: of the tokens.
      least: the smallest size.

    Raises:
      TooShortError: if the least size does not fit.
    """
    first = low_count = count(least)
    if first > limit:
        raise TooShortError(first)
    low, high, high_count, same_side = least, None, 0, 0
    while limit - low_count > _CLOSE * limit and (high is None or high - low > 1):
        if high is None:
            rate = (low_count - first) / (low - least) if low > least else 0.0
            step = int((limit - low_count) / rate) if rate > 0 else 2 * (low - least) or 8
            size = low + max(1, step)
        elif abs(same_side) >= 2:
            size = (low + high) // 2
        else:
            step = int((high - low) * (limit - low_count) / (high_count - low_count))
            size = low + min(max(1, step), high - low - 1)
        tokens = count(size)
        if tokens <= limit:
            low, low_count, same_side = size, tokens, max(1, same_side + 1)
        else:
            high, high_count, same_side = size, tokens, min(-1, same_side - 1)
    return low
