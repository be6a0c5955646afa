"""Which corpus each row of a mixture comes from: a function of the weights and of the row's number alone.

Corpus c, of share w_c (all shares add up to 1), has its row j due at the time (j + 1/2) / w_c. The rows of all C
corpora by these times, those of one time in the order of the corpora, are the rows 0, 1, 2, ... of the mixture. So of
the first i rows w_c i are of corpus c, but for (1 - w_c) / 2 + w_c (C - 1) / 2 at most, which is half a row of two
corpora. (Webster's rule, or Sainte-Lague's, where seats are divided.)

Rows due until the time t are about t; from there on they are counted one by one.
"""

import fractions
import heapq
import math
from collections.abc import Iterable


class Mixture:
    """The order of a mixture's rows. Its arithmetic is exact, so that rows are the same everywhere."""

    def __init__(self, weights: Iterable[float]):
        """Takes weights above 0 in any unit, as the decimal numbers that Python prints for them."""
        given = [fractions.Fraction(str(weight)) for weight in weights]
        self._shares = [weight / sum(given) for weight in given]
        unit = math.lcm(*(share.numerator for share in self._shares))
        self._half_steps = [unit * share.denominator // share.numerator for share in self._shares]  # between rows

    def rows(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Of each of the rows `start` .. `stop` - 1 the corpus, and how many rows of that came before."""
        time = max(0, start - len(self._shares))
        counts = [math.floor(share * time + fractions.Fraction(1, 2)) for share in self._shares]
        due = [((2 * count + 1) * self._half_steps[corpus], corpus) for corpus, count in enumerate(counts)]
        heapq.heapify(due)
        rows = []
        for row in range(sum(counts), stop):
            at, corpus = due[0]
            if row >= start:
                rows.append((corpus, counts[corpus]))
            counts[corpus] += 1
            heapq.heapreplace(due, (at + 2 * self._half_steps[corpus], corpus))
        return rows
