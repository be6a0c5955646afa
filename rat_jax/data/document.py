"""Documents as a source yields them, and what reads those of one file."""

import abc
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from rat_jax.data import DataError
from rat_jax.data.utf8_file import decode


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and where it stood, for messages."""

    name: str
    text: str
    separated: bool = False  # a `document_separator` stood before or after it


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """How sources read what they find."""

    field: str  # that holds the text: a key of JSON, a column of Parquet and of data sets; dots lead into objects
    document_separator: str | None  # ends a document inside a text file; None: a text file is one document
    invalid_utf8: Literal["refuse", "replace"]  # replace writes U+FFFD and continues
    # Makes the text of a whole record and the name of its place, in the stead of `field`; raises DataError.
    read_record: Callable[[object, str], str] | None = None


@dataclasses.dataclass(frozen=True)
class FileReader(abc.ABC):
    """Reads files of one kind."""

    options: ReadOptions

    @property
    @abc.abstractmethod
    def kind(self) -> str:
        """What such a file is called in messages."""

    @abc.abstractmethod
    def documents(self, path: pathlib.Path) -> Iterator[Document]:
        """The documents of a file, in order.

        Raises:
          DataError: naming the file, and its line or row, that cannot be read.
        """

    def check(self, path: pathlib.Path) -> None:
        """Reads the first document, so that a file of another form is refused before any work."""
        next(self.documents(path), None)

    def num_documents(self, path: pathlib.Path) -> int | None:
        """How many documents there are, where that is known before reading them."""
        return None


def field_text(record: object, name: str, options: ReadOptions) -> str:
    """The text of a record: a missing value is an empty document, anything but text is refused.

    `meta.text` names the key of that name or, where there is none, the key `text` of the object `meta`.

    Raises:
      DataError: naming the fields that are there.
    """
    if options.read_record is not None:
        return options.read_record(record, name)
    value: object = record
    for key in [options.field] if _has(record, options.field) else options.field.split("."):
        if value is None and value is not record:
            break  # an object that is null has no text, as a text that is null
        if not _has(value, key):
            there = listed(value) if isinstance(value, dict) else f"a {type(value).__name__}"
            raise DataError(f"{name} has no field {options.field!r} (it has: {there}); name the text with --field")
        value = value[key]
    match value:
        case None:
            return ""
        case bytes():
            return decode(value, name, options.invalid_utf8)
        case str():  # JSON may hold halves of a pair
            return decode(value.encode(errors="surrogatepass"), name, options.invalid_utf8)
        case _:
            raise DataError(f"{name}: field {options.field!r} must hold text, got {type(value).__name__}")


def listed(names: Iterable[str]) -> str:
    """Names of fields for a message, which stays short whatever they are."""
    shown = [printable(name if len(name) <= 40 else f"{name[:40]}...") for name in names]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:12], f"and {len(shown) - 12} more"])


def printable(text: object) -> str:
    """The text of an error or of a file, for a message of one line: other characters are written as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(text).split()))


def _has(record: object, key: str) -> bool:
    return isinstance(record, dict) and key in record
