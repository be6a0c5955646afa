"""Documents that are there already, word for word or nearly.

Two documents are nearly the same if of all runs of five words in either, at least 80 % are in both. The share (the
Jaccard index) is estimated by MinHash signatures, which locality-sensitive hashing compares (A. Broder, On the
resemblance and containment of documents, 1997).
"""

import enum
import hashlib
import zlib

from datasketch import MinHash, MinHashLSH

SHARE, RUN_WORDS = 0.8, 5
_NUM_HASHES = 128
_RUNS_AT_A_TIME = 4096  # bounds the memory of a long document


class Novelty(enum.Enum):
    """Whether a document was there."""

    NEW = "new"
    DOUBLE = "double"
    NEAR_DOUBLE = "near double"


class Seen:
    """The documents so far."""

    def __init__(self):
        self._digests: set[bytes] = set()
        self._signatures: dict[bytes, MinHash] = {}  # of those that were new
        self._alike = MinHashLSH(threshold=SHARE, num_perm=_NUM_HASHES)

    def add(self, text: str) -> Novelty:
        """What a document is among those added before; only a new one is added."""
        words = text.split()
        digest = hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest()
        if digest in self._digests:
            return Novelty.DOUBLE
        self._digests.add(digest)
        signature = _signature(words)
        if any(signature.jaccard(self._signatures[other]) >= SHARE for other in self._alike.query(signature)):
            return Novelty.NEAR_DOUBLE
        self._signatures[digest] = signature
        self._alike.insert(digest, signature)
        return Novelty.NEW


def _signature(words: list[str]) -> MinHash:
    signature = MinHash(num_perm=_NUM_HASHES, seed=1, hashfunc=zlib.crc32)
    runs = list({" ".join(words[i : i + RUN_WORDS]).encode() for i in range(max(1, len(words) - RUN_WORDS + 1))})
    for start in range(0, len(runs), _RUNS_AT_A_TIME):
        signature.update_batch(runs[start : start + _RUNS_AT_A_TIME])
    return signature
