"""Text from token ids as they come."""

from collections.abc import Sequence

import numpy as np

from rat_jax.data.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character


class StreamDecoder:
    """Decodes ids that arrive one by one: `"".join` of all that `push` and `flush` return is the text of all ids.

    A character whose last bytes are still to come is held back, and so is a run of `Tokenizer.byte_ids` until it ends,
    since one byte that fits no character turns all of the run into U+FFFD.
    """

    # The window of ids that is decoded again with each push; a short past is kept since some tokenizers write an id
    # differently at the start of a text.
    _MOST_IDS = 64
    _PAST_IDS = 16

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._num_written = 0  # characters of the window's text that were returned

    def begin(self, ids: Sequence[int]) -> None:
        """Takes ids whose text is known, those of a prompt: only the text of what follows is returned.

        A run of bytes at their end is over: no later byte changes what the prompt says.
        """
        self._ids = list(ids)
        del self._ids[self._num_settled() :]
        self._num_written = len(self._tokenizer.decode(self._ids))

    def push(self, ids: int | Sequence[int]) -> str:
        """The text that is certain after one more id, or several."""
        self._ids.extend([ids] if isinstance(ids, (int, np.integer)) else ids)
        num_settled = self._num_settled()
        text = self._tokenizer.decode(self._ids[:num_settled])
        certain = text.rstrip(_REPLACEMENT)
        new = certain[self._num_written :]
        self._num_written += len(new)
        if num_settled == len(self._ids) > self._MOST_IDS and certain == text:
            self._forget(text)
        return new

    def _num_settled(self) -> int:
        """The ids before the run of bytes at the end."""
        count = len(self._ids)
        if self._tokenizer.byte_ids:
            in_run = self._tokenizer.byte_ids | {self._tokenizer.eos_id}  # the end stands for no text: it ends none
            while count and self._ids[count - 1] in in_run:
                count -= 1
        return count

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
