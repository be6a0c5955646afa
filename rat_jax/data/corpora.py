"""The corpora that a model reads, which have what a model can have once: a tokenizer and a chat template."""

import dataclasses
import pathlib
from collections.abc import Callable

from rat_jax.data import DataError
from rat_jax.data.chat_template import ChatTemplate
from rat_jax.data.corpus import Corpus
from rat_jax.data.tokenizer import Tokenizer
from rat_jax.data_config import DataConfig


@dataclasses.dataclass(frozen=True)
class Corpora:
    """Corpora of one tokenizer, by name; the one of `data.path` has the empty name."""

    by_name: dict[str, Corpus]

    @classmethod
    def open(cls, config: DataConfig) -> "Corpora":
        """The corpora of a config.

        Raises:
          DataError: if one cannot be read, or two do not go together, naming both.
        """
        corpora = cls({name: Corpus.open(path) for name, path in config.paths.items()})
        corpora.check()
        return corpora

    def check(self) -> None:
        """Refuses corpora that do not go together; errors as of `open`."""
        with_template = None
        for name, corpus in self.by_name.items():
            if corpus.tokenizer_hash != self.first.tokenizer_hash:
                raise DataError(
                    f"data.corpora.{name}, {corpus.path}, was made by another tokenizer than data.corpora."
                    f"{next(iter(self.by_name))}, {self.first.path}: prepare it with `--tokenizer {self.first.path}`"
                )
            if corpus.chat_template_hash is None:
                continue
            if with_template is None:
                with_template = corpus
            elif corpus.chat_template_hash != with_template.chat_template_hash:
                raise DataError(
                    f"data.corpora.{name}, {corpus.path}, was made with another chat template than "
                    f"{with_template.path}: prepare one of the two again"
                )

    @property
    def first(self) -> Corpus:
        return next(iter(self.by_name.values()))

    def tokenizer(self) -> Tokenizer:
        """As `Corpus.tokenizer`."""
        return self.first.tokenizer()

    def chat_template(self) -> ChatTemplate | None:
        """As `Corpus.chat_template`, of the corpora that have one."""
        templates = [corpus.chat_template() for corpus in self.by_name.values()]
        return next((template for template in templates if template is not None), None)

    def check_tokenizer(self, folder: pathlib.Path) -> None:
        """As `Corpus.check_tokenizer`."""
        self.first.check_tokenizer(folder)

    def verify(self, *, max_bytes: int | None, say: Callable[[str], None]) -> None:
        """As `Corpus.verify`, of all."""
        for corpus in self.by_name.values():
            corpus.verify(max_bytes=max_bytes, say=say)
