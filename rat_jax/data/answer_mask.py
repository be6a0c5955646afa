"""The ids of an example, and which of them are answers."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from rat_jax.data import DataError
from rat_jax.data.chat_template import END
from rat_jax.data.example import Example
from rat_jax.data.tokenizer import Tokenizer, token_dtype
from rat_jax.errors import shown


class MaskedIds(NamedTuple):
    """A prompt and its answer."""

    ids: np.ndarray  # [n], in the dtype of a token file
    is_answer: np.ndarray  # [n], bool: the ids that are learned, the end of each answer among them


def prompt_ids(example: Example, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids before the last answer, and to which of the earlier answers each belongs: 1, 2, ...; 0 to none.

    Prompts and answers are tokenised one by one, so that a prompt has the same ids whether its answer is known or not.

    Raises:
      DataError: if the tokenizer refuses a text, or has no ids for it.
    """
    ids, numbers = [], []
    for number, turn in enumerate(example.earlier, start=1):
        for part, of_part in ((_encode(turn.prompt, tokenizer), 0), (_answer_ids(turn.answer, tokenizer), number)):
            ids += part
            numbers += [of_part] * len(part)
    last = _encode(example.prompt, tokenizer)
    if not last:
        raise DataError(f"the tokenizer has no ids for the prompt {shown(example.prompt)}")
    return ids + last, numbers + [0] * len(last)


def masked_ids(example: Example, tokenizer: Tokenizer, seq_len: int) -> Iterator[tuple[MaskedIds | None, bool]]:
    """The ids of an example with each of its answers, and whether its prompt was cut (`cut_middle`).

    Of a prompt that is too long all room is used that the answer leaves. An earlier answer that has lost a part is not
    learned.

    Yields:
      None in place of the ids where the answer leaves no room for a token of a prompt.

    Raises:
      DataError: if the tokenizer refuses a text.
    """
    prompt, numbers = prompt_ids(example, tokenizer)
    for answer in example.answers:
        ids = _answer_ids(answer, tokenizer)
        room = seq_len - len(ids)
        if room < 1:
            yield None, False
            continue
        kept = np.asarray(cut_middle(numbers, room))
        whole = np.bincount(numbers, minlength=1) == np.bincount(kept, minlength=max(numbers) + 1)
        is_answer = np.append((kept > 0) & whole[kept], np.ones(len(ids), bool))
        all_ids = np.asarray(cut_middle(prompt, room) + ids, token_dtype(tokenizer.vocab_size))
        yield MaskedIds(all_ids, is_answer), len(prompt) > room


def cut_middle(values: list[int], room: int) -> list[int]:
    """At most `room` values, 1 or more: those of the beginning and of the end, half of the room each."""
    if len(values) <= room:
        return values
    tail = room // 2
    return values[: room - tail] + values[len(values) - tail :]


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text in which `END` stands for the id that ends documents."""
    first, *others = text.split(END)
    ids = tokenizer.encode(first) if first else []
    for part in others:
        ids = [*ids, tokenizer.eos_id, *(tokenizer.encode(part) if part else [])]
    return ids


def _answer_ids(answer: str, tokenizer: Tokenizer) -> list[int]:
    return [*tokenizer.encode(answer), tokenizer.eos_id]
