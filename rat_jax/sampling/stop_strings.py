"""Text that ends where the first of several strings appears, wherever the borders of its tokens are."""

from collections.abc import Callable, Sequence
from typing import Any

from rat_jax.data.tokenizer import Tokenizer
from rat_jax.model import LanguageModel
from rat_jax.sampling.errors import SamplingError
from rat_jax.sampling.generation import generate
from rat_jax.sampling.stream_decoder import StreamDecoder


def check_stop(stop: Sequence[str]) -> None:
    """Refuses strings that cannot end a text.

    Raises:
      SamplingError: if one is empty.
    """
    if "" in stop:
        raise SamplingError("a stop string is empty, which would end every text before it begins: leave it out")


class StoppedText:
    """The text of tokens that come one by one or several at a time, up to a stop string.

    The stop string that is complete first ends the text, of several that end at the same character the longest one;
    so the text does not depend on how many tokens come at a time.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]):
        """Before the first new token after `prompt`, whose text is not searched; errors as of `check_stop`."""
        check_stop(stop)
        self.text = ""
        self.is_stopped = False
        self._stop = stop
        self._decoder = StreamDecoder(tokenizer)
        self._decoder.begin(prompt)

    @property
    def certain(self) -> str:
        """The text so far without an end that may turn out to begin a stop string."""
        most = max((len(string) - 1 for string in self._stop), default=0)
        for start in range(max(0, len(self.text) - most), len(self.text)):
            if any(string.startswith(self.text[start:]) for string in self._stop):
                return self.text[:start]
        return self.text

    def push(self, ids: Sequence[int]) -> None:
        """Takes the next tokens; none mean that the text is complete. After a stop string nothing is taken."""
        if not self.is_stopped:
            self._add(self._decoder.push(ids) if ids else self._decoder.flush())

    def _add(self, new: str) -> None:
        num_known = len(self.text)
        text = self.text + new
        # Of each string the first appearance that ends in the new part: (its end, its start).
        found = []
        for string in self._stop:
            start = text.find(string, max(0, num_known - len(string) + 1))
            if start >= 0:
                found.append((start + len(string), start))
        if found:
            self.is_stopped = True
            text = text[: min(found)[1]]
        self.text = text


def generate_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    on_text: Callable[[int, str], None] = lambda index, text: None,
    **settings: Any,
) -> list[str]:
    """Continues every prompt up to a stop string, the end of a document, or `max_new_tokens`.

    The longest prompts are continued first, another as soon as a text ends. A text does not depend on the others, as
    `generate` says.

    Args:
      model: what predicts.
      tokenizer: the model's.
      prompts: ids, at least one each.
      stop: strings that end a text, of which they are no part; found in new text alone. None there: texts end
        otherwise.
      max_new_tokens: the most tokens of a text.
      batch_size: prompts that are continued at a time.
      on_text: called with a prompt's index and its text as soon as that is complete.
      **settings: of `rat_jax.sampling.generation.generate`: temperature, top_k, top_p, repetition_penalty, seed.

    Returns:
      The text after each prompt.

    Raises:
      SamplingError: an empty stop string; or as `generate`, which counts prompts from the longest.
    """
    texts = [StoppedText(tokenizer, prompt, stop) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))

    def add(place: int, ids: list[int]) -> bool:
        index = order[place]
        text = texts[index]
        text.push(ids)
        if not ids:
            on_text(index, text.text)
        return text.is_stopped

    generate(
        model,
        [prompts[index] for index in order],
        max_new_tokens=max_new_tokens,
        eos_id=tokenizer.eos_id,
        batch_size=batch_size,
        on_tokens=add,
        **settings,
    )
    return [text.text for text in texts]
