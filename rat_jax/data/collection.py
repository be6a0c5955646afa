"""All documents of a corpus that is to be prepared, each in its split."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from rat_jax.data import DataError
from rat_jax.data.corpus import SPLITS, Split
from rat_jax.data.document import Document
from rat_jax.data.sources import Files, Source
from rat_jax.data.splits import cut, split_of

_BYTE_ORDER_MARK = "\ufeff"


@dataclasses.dataclass
class Collection:
    """The documents of some sources, read anew each time.

    Validation documents are those of sources of their own. Without such sources they are a part of the documents, by
    their content (`split_of`), or, if a split would have none, the tail of each document (`cut`). `settle` finds out.
    """

    sources: Sequence[Source]
    validation_sources: Sequence[Source]
    validation_fraction: float
    empty_split: Split | None = None  # that would have no whole document, so that all are cut; set by `settle`
    separator_occurs: bool = False  # set while documents are read

    def check(self) -> None:
        """Reads the first document of each file; errors as of `Source.check`."""
        for source in (*self.sources, *self.validation_sources):
            source.check()

    def settle(self) -> bool:
        """Settles where validation text comes from, and reads until it is sure that both splits have documents.

        Returns:
          Whether all documents were read.

        Raises:
          DataError: if a split has none.
        """
        if self.validation_sources:
            for sources, option in ((self.sources, "--source"), (self.validation_sources, "--validation_source")):
                if next(self._texts(sources), None) is None:
                    split = "train" if sources is self.sources else "validation"
                    raise DataError(f"no documents in the {split} split: {option} holds no text")
            return False
        counts: collections.Counter[Split] = collections.Counter()
        can_cut = False
        for text in self._texts(self.sources):
            counts[split_of(text, self.validation_fraction)] += 1
            can_cut = can_cut or cut(text, self.validation_fraction)[1] != ""
            if len(counts) == len(SPLITS):
                return False
        if not counts:
            raise DataError(f"empty corpus: {_counted(_contents(self.sources))}, and no text in it")
        empty = "train" if counts["validation"] else "validation"
        if not can_cut:
            raise DataError(
                f"no documents in the {empty} split: {counts.total()} documents at --validation_fraction "
                f"{self.validation_fraction}, too short to be cut in two; change the fraction, cut files into "
                f"documents with --document_separator, or give a --validation_source"
            )
        self.empty_split = empty
        return True

    @property
    def num_documents(self) -> int | None:
        """How many `documents` yields at most, where that is known before reading them."""
        counts = [source.num_documents for source in (*self.sources, *self.validation_sources)]
        return None if None in counts or self.empty_split else sum(counts)

    def documents(self) -> Iterator[tuple[Split | None, str]]:
        """All texts that are not empty, with their split where it is not `split_of` that settles it."""
        for text in self._texts(self.sources):
            if self.empty_split:
                parts = zip(SPLITS, cut(text, self.validation_fraction), strict=True)
                yield from ((split, part) for split, part in parts if part)
            else:
                yield "train" if self.validation_sources else None, text
        for text in self._texts(self.validation_sources):
            yield "validation", text

    def train_texts(self) -> Iterator[str]:
        """The texts of the training split."""
        for split, text in self.documents():
            if (split or split_of(text, self.validation_fraction)) == "train":
                yield text

    def _texts(self, sources: Iterable[Source]) -> Iterator[str]:
        for source in sources:
            for document in source.documents():
                self.separator_occurs = self.separator_occurs or document.separated
                if text := _text(document):
                    yield text

    @property
    def num_separated(self) -> int:
        """How many files are cut at a separator."""
        sources = (*self.sources, *self.validation_sources)
        return sum(source.num_separated for source in sources if isinstance(source, Files))

    def describe(self) -> list[str]:
        """What was found, in a line for each kind of source, and what the sources note."""
        lines = [note for source in (*self.sources, *self.validation_sources) for note in source.notes]
        for sources, use in ((self.sources, "found"), (self.validation_sources, "found for validation")):
            if sources:
                compressions: collections.Counter[str] = collections.Counter()
                for source in sources:
                    compressions.update(source.compressions if isinstance(source, Files) else {})
                packed = ", ".join(f"{count:,} {suffix}" for suffix, count in compressions.items())
                lines.append(f"{use} {_counted(_contents(sources))}" + f" ({packed} among them)" * bool(packed))
        return lines


def _contents(sources: Iterable[Source]) -> collections.Counter[str]:
    contents: collections.Counter[str] = collections.Counter()
    for source in sources:
        contents.update(source.contents)
    return contents


def _counted(contents: collections.Counter[str]) -> str:
    return ", ".join(f"{count:,} {kind}{'s' * (count != 1)}" for kind, count in contents.items())


def _text(document: Document) -> str:
    return document.text.removeprefix(_BYTE_ORDER_MARK)  # of a file that was put together with others
