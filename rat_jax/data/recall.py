"""Multi-query associative recall (after arXiv 2312.04927): documents that only a memory beyond a window can answer.

A document is 81 ids:

    8 pairs      2 + 4 k + v: key k has value v; every key once, in random order, with random values
    4 queries    34 + k, 42 + v: a key and then its value
    56 fillers   1
    4 queries    of the other keys
    the end      0

The queries right after the pairs ask for what is at most 14 ids before them; the later ones for what is at
least 65 ids before them, which two layers that see 32 earlier tokens each do not reach together.
"""

from collections.abc import Iterator

import numpy as np

NUM_KEYS = 8
NUM_VALUES = 4
DOCUMENT_TOKENS = 81
NEAR_QUERIES = range(8, 16, 2)  # positions of the queries' keys in a document
FAR_QUERIES = range(72, 80, 2)
END, FILLER = 0, 1
_FIRST_PAIR = 2
_FIRST_KEY = _FIRST_PAIR + NUM_KEYS * NUM_VALUES
_FIRST_VALUE = _FIRST_KEY + NUM_KEYS
VOCAB_SIZE = _FIRST_VALUE + NUM_VALUES


def recall_documents(count: int) -> Iterator[np.ndarray]:
    """Random documents without their ends, the same ones each time."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        ids = np.full(DOCUMENT_TOKENS - 1, FILLER)
        keys, values = rng.permutation(NUM_KEYS), rng.integers(0, NUM_VALUES, NUM_KEYS)
        ids[:NUM_KEYS] = _FIRST_PAIR + NUM_VALUES * keys + values
        for position, asked in zip([*NEAR_QUERIES, *FAR_QUERIES], rng.permutation(NUM_KEYS), strict=True):
            ids[position : position + 2] = _FIRST_KEY + keys[asked], _FIRST_VALUE + values[asked]
        yield ids
