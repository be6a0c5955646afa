"""Text from token ids as they come."""

from collections.abc import Sequence

import numpy as np

from rat_jax.data.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character


class StreamDecoder:
    """Decodes ids that arrive one by one: `"".join` of all that `push` and `flush` return is the text of all ids.

    A character whose last bytes are still to come is held back.
    """

    # The window of ids that is decoded again with each push; a short past is kept since some tokenizers write an id
    # differently at the start of a text.
    _MOST_IDS = 64
    _PAST_IDS = 16

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._num_written = 0  # characters of the window's text that were returned

    def push(self, ids: int | Sequence[int]) -> str:
        """The text that is certain after one more id, or several."""
        self._ids.extend([ids] if isinstance(ids, (int, np.integer)) else ids)
        text = self._tokenizer.decode(self._ids)
        certain = text.rstrip(_REPLACEMENT)
        new = certain[self._num_written :]
        self._num_written += len(new)
        if len(self._ids) > self._MOST_IDS and certain == text:
            self._forget(text)
        return new

    def _forget(self, text: str) -> None:
        for count in range(self._PAST_IDS, self._PAST_IDS + 4):  # a character has at most 4 bytes: cut none in two
            past = self._tokenizer.decode(self._ids[-count:])
            if text.endswith(past):
                self._ids, self._num_written = self._ids[-count:], len(past)
                return

    def flush(self) -> str:
        """What was held back; the decoder is then as new."""
        rest = self._tokenizer.decode(self._ids)[self._num_written :]
        self._ids, self._num_written = [], 0
        return rest
