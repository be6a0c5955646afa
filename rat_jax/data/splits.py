"""Which documents, or which parts of them, are for validation."""

import hashlib
import re
import unicodedata

from rat_jax.data.corpus import Split

_LINE_END = re.compile(r"(?<=\n)|(?<=\r)(?!\n)")  # the place after it
_SPACE = re.compile(r"(?<=\S)(?=[ \t])")  # the place before it
_ANY_SPACE = re.compile(r"(?<=[\r\n])|(?=[ \t])")
_WORD_CHARACTERS = 1000  # what is longer without a space is no word, and may be cut anywhere
_JOINERS = "\u200c\u200d"  # zero width; what stands on both sides is one character for a reader


def split_of(text: str, validation_fraction: float) -> Split:
    """The split of a document, by its content alone: equal texts are never in both splits."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "little") < validation_fraction * 2**64 else "train"


def cut(text: str, validation_fraction: float) -> tuple[str, str]:
    """Cuts a document: its beginning is for training, its tail for validation; together they are `text`.

    The tail has about `validation_fraction` of the characters. The cut is at the line end nearest to that place, else
    before the nearest space, both looked for half a tail to both sides (half a beginning, if that is shorter); else at
    the nearest of the two within a thousand characters, else between any two characters. Equal texts are cut equally.
    A text that is too short keeps its tail, and the second part is empty.
    """
    place = len(text) - round(len(text) * validation_fraction)
    if place in (0, len(text)):
        return text, ""
    reach = min(len(text) - place, place) // 2
    for pattern, distance in ((_LINE_END, reach), (_SPACE, reach), (_ANY_SPACE, _WORD_CHARACTERS)):
        start, end = max(place - distance, 1), min(place + distance, len(text) - 1)
        if places := [match.start() for match in pattern.finditer(text, start, end)]:
            place = min(places, key=lambda candidate: abs(candidate - place))
            break
    else:
        if len(text) < _WORD_CHARACTERS:
            return text, ""
    while place and _is_one_character(text[place - 1 : place + 1]):
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
