"""All examples of a corpus that is to be prepared, each in its split."""

import dataclasses
from collections.abc import Iterator

from rat_jax.data import DataError
from rat_jax.data.collection import Collection
from rat_jax.data.corpus import SPLITS, Split
from rat_jax.data.example import Example
from rat_jax.data.splits import split_of


@dataclasses.dataclass
class ExampleCollection(Collection):
    """The examples of sources that `ExampleReader` reads, as texts of JSON.

    Validation examples are those of sources of their own, or else a part of the examples, by their prompts: all
    answers to a prompt are in one split. None is cut.
    """

    def settle(self) -> bool:
        """Reads until it is sure that both splits have examples.

        Returns:
          Whether all were read.

        Raises:
          DataError: if a split has none.
        """
        if self.validation_sources:
            return super().settle()
        found: set[Split] = set()
        for text in self._texts(self.sources):
            found.add(self._split_of(text))
            if len(found) == len(SPLITS):
                return False
        if not found:
            raise DataError("no examples: --source holds none")
        (missing,) = set(SPLITS) - found
        raise DataError(
            f"no examples in the {missing} split at --validation_fraction {self.validation_fraction}: change the "
            f"fraction, or give a --validation_source"
        )

    def documents(self) -> Iterator[tuple[Split | None, str]]:
        """All examples with their split."""
        for split, text in super().documents():
            yield split or self._split_of(text), text

    def train_texts(self) -> Iterator[str]:
        """The texts of prompts and answers of the training split."""
        for split, text in self.documents():
            if split == "train":
                yield from Example.from_text(text).texts()

    def _split_of(self, text: str) -> Split:
        return split_of(Example.from_text(text).key, self.validation_fraction)
