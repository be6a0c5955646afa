"""Which documents, or which parts of them, are for validation."""

import hashlib
import re
import unicodedata

from rat_jax.data.corpus import Split

_LINE_END = re.compile(r"\n|\r(?!\n)")
_SPACE = re.compile(r"(?<=\S)(?=[ \t])")
_JOINERS = "\u200c\u200d"  # zero width; what stands on both sides is one character for a reader


def split_of(text: str, validation_fraction: float) -> Split:
    """The split of a document, by its content alone: equal texts are never in both splits."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "little") < validation_fraction * 2**64 else "train"


def cut(text: str, validation_fraction: float) -> tuple[str, str]:
    """Cuts a document: its beginning is for training, its tail for validation; together they are `text`.

    The tail has about `validation_fraction` of the characters. The cut is at the line end nearest to that place, else
    before a space, else between two characters; line end and space are looked for half a tail to both sides (half a
    beginning, if that is shorter). Equal texts are cut equally. A text that is too short keeps
    its tail, and the second part is empty.
    """
    place = len(text) - round(len(text) * validation_fraction)
    reach = min(len(text) - place, place) // 2
    start, end = place - reach, place + reach
    ends = [match.end() for match in _LINE_END.finditer(text, start, end)]
    spaces = [] if ends else [match.start() for match in _SPACE.finditer(text, start, end)]
    if ends or spaces:
        place = min(ends or spaces, key=lambda candidate: abs(candidate - place))
    while 0 < place < len(text) and _is_one_character(text[place - 1 : place + 1]):
        place -= 1
    return (text[:place], text[place:]) if place else (text, "")


def _is_one_character(pair: str) -> bool:
    """Whether a reader sees one: a letter and its accent, a line end of two, an emoji and what changes it."""
    before, after = pair
    return (
        pair == "\r\n"
        or unicodedata.category(after).startswith("M")  # accents, variation selectors
        or before in _JOINERS
        or after in _JOINERS
        or "\U0001f3fb" <= after <= "\U0001f3ff"  # skin tones
    )
