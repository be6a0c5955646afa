"""What decides the tokens of a corpus that is to be prepared."""

import dataclasses
import pathlib
from typing import Any

from rat_jax.data import DataError
from rat_jax.data.chat_template import ChatTemplate, load_chat_template, read_chat_template
from rat_jax.data.document import ReadOptions
from rat_jax.data.example import ExampleReader
from rat_jax.data.example_figures import ROW_KINDS, RowKind
from rat_jax.data.prepare_flags import DEFAULT_FIELD, PACKINGS
from rat_jax.data.tokenizer_choice import absolute_tokenizer, is_path
from rat_jax.paths import absolute_source, local_path

RELEASE_BIN = "release-bin:"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the tokens. A finished folder is used again only for equal settings."""

    source: tuple[str, ...]
    validation_source: tuple[str, ...]  # empty: validation documents are taken from `source`
    validation_fraction: float  # of the documents; those whose content hash falls below it
    tokenizer: str
    eos_token: str | None
    field: str
    document_separator: str | None
    invalid_utf8: str
    rows: RowKind | None = None  # how rows hold examples; None: the sources hold documents, not examples
    seq_len: int | None = None  # tokens of a row of examples, or of documents that are packed
    chat_template: str | None = None  # file of it; None: the one stored with the tokenizer, if there is one
    packing: str | None = None  # how training documents are put into rows; None: they follow one another

    def read_options(self, template: ChatTemplate | None) -> ReadOptions:
        read_record = None if self.rows is None else ExampleReader(template)
        return ReadOptions(self.field, self.document_separator, self.invalid_utf8, read_record)

    def read_chat_template(self) -> ChatTemplate | None:
        """What makes texts of chats.

        Raises:
          DataError: if it is not there, or no template.
        """
        if self.chat_template is not None:
            return read_chat_template(local_path(self.chat_template, "--chat_template"))
        folder = pathlib.Path(self.tokenizer)
        return load_chat_template(folder) if self.rows and is_path(self.tokenizer) and folder.is_dir() else None

    @property
    def is_release(self) -> bool:
        """Whether the sources are token files of the PyTorch release."""
        return any(spec.startswith(RELEASE_BIN) for spec in self.source + self.validation_source)

    def check(self) -> None:
        """Refuses settings that do not go together.

        Raises:
          DataError: naming the flag.
        """
        specs = self.source + self.validation_source
        if not self.source:
            raise DataError("--source is missing")
        if self.is_release and not (
            len(self.source) == len(self.validation_source) == 1 and all(s.startswith(RELEASE_BIN) for s in specs)
        ):
            raise DataError(
                "release-bin: give one training file as --source and one validation file as --validation_source"
            )
        _check_rows(self)
        if self.document_separator == "":
            raise DataError("--document_separator is empty; leave it out where a file is one document")
        if self.validation_source:
            return
        if not 0 < self.validation_fraction < 1:
            raise DataError(f"--validation_fraction must lie between 0 and 1, got {self.validation_fraction}")

    def absolute(self) -> "Settings":
        """The same with absolute paths."""
        return dataclasses.replace(
            self,
            source=tuple(map(absolute_source, self.source)),
            validation_source=tuple(map(absolute_source, self.validation_source)),
            tokenizer=absolute_tokenizer(self.tokenizer),
            chat_template=self.chat_template and str(local_path(self.chat_template, "--chat_template")),
        )

    def as_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return values | {name: list(values[name]) for name in ("source", "validation_source")}


def _check_rows(settings: Settings) -> None:
    if settings.rows is None:
        if settings.chat_template is not None:
            raise DataError("--chat_template is for examples: give --rows packed or padded too")
        _check_packing(settings)
        return
    if settings.packing is not None:
        raise DataError("--packing is for documents; examples are packed by --rows packed: leave it out")
    if settings.rows not in ROW_KINDS:
        raise DataError(f"--rows must be one of {', '.join(ROW_KINDS)}, got {settings.rows!r}")
    if settings.seq_len is None or settings.seq_len < 2:
        raise DataError(f"--rows wants --seq_len, the tokens of a row, 2 or more; got {settings.seq_len}")
    if settings.field != DEFAULT_FIELD or settings.document_separator is not None:
        raise DataError("--field and --document_separator are for documents, and have no effect with --rows")
    if settings.is_release:
        raise DataError("--rows wants examples, and release-bin holds ids of documents: leave one of the two out")


def _check_packing(settings: Settings) -> None:
    if settings.packing is None:
        if settings.seq_len is not None:
            raise DataError("--seq_len is for rows: give --rows packed or padded for examples, --packing for documents")
        return
    if settings.packing not in PACKINGS:
        raise DataError(f"--packing must be one of {', '.join(PACKINGS)}, got {settings.packing!r}")
    if settings.seq_len is None or settings.seq_len < 2:
        raise DataError(f"--packing wants --seq_len, the tokens of a row, 2 or more; got {settings.seq_len}")
    if settings.is_release:
        raise DataError("--packing writes rows, and release-bin uses files as they are: leave one of the two out")
