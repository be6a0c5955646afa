"""Where text comes from: files, folders, tables, Hugging Face data sets, Python's own standard library.

A source yields its documents one by one and in the same order each time, so that a corpus may be larger than memory.
"""

import abc
import dataclasses
import glob
import gzip
import json
import pathlib
import sysconfig
import zlib
from collections.abc import Iterator
from typing import Literal

from rat_jax.data import DataError
from rat_jax.data.recall import recall_documents

_BLOCK_CHARACTERS = 1 << 20


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and where it stood, for messages."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """How sources read what they find."""

    field: str  # that holds the text: a key of JSON lines, a column of Parquet and of data sets
    document_separator: str | None  # ends a document inside a text file; None: a text file is one document
    invalid_utf8: Literal["refuse", "replace"]  # replace writes U+FFFD and continues


class Source(abc.ABC):
    """A sequence of documents."""

    @property
    def num_documents(self) -> int | None:
        """How many documents there are, where that is known before reading them (for the progress bar)."""
        return None

    @abc.abstractmethod
    def documents(self) -> Iterator[Document]:
        """The documents, from the first, in an order that does not change.

        Raises:
          DataError: naming the file, and its line or row, that cannot be read.
        """


@dataclasses.dataclass(frozen=True)
class TextFiles(Source):
    """Plain text, UTF-8: one document a file, or several with a separator between them."""

    paths: tuple[pathlib.Path, ...]
    options: ReadOptions

    @property
    def num_documents(self) -> int | None:
        return len(self.paths) if self.options.document_separator is None else None

    def documents(self) -> Iterator[Document]:
        for path in self.paths:
            if self.options.document_separator is None:
                yield Document(str(path), _decode(_read(path), str(path), self.options))
            else:
                yield from self._separated(path, self.options.document_separator)

    def _separated(self, path: pathlib.Path, separator: str) -> Iterator[Document]:
        errors = "strict" if self.options.invalid_utf8 == "refuse" else "replace"
        number, rest = 0, ""
        try:
            with path.open(encoding="utf-8", errors=errors, newline="") as file:
                while block := file.read(_BLOCK_CHARACTERS):
                    *texts, rest = (rest + block).split(separator)
                    for text in texts:
                        number += 1
                        yield Document(f"{path}, document {number}", text)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, after document {number}, {_not_utf8(error)}") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        yield Document(f"{path}, document {number + 1}", rest)


@dataclasses.dataclass(frozen=True)
class JsonLines(Source):
    """One JSON object a line, with the text under one key; `.gz` files are unpacked on the way."""

    paths: tuple[pathlib.Path, ...]
    options: ReadOptions

    def documents(self) -> Iterator[Document]:
        for path in self.paths:
            try:
                with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                    for number, line in enumerate(file, start=1):
                        if line.strip():
                            yield self._document(line, f"{path}, line {number}")
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"{path} cannot be read: {error}") from None

    def _document(self, line: bytes, name: str) -> Document:
        try:
            record = json.loads(_decode(line, name, self.options))
        except json.JSONDecodeError as error:
            raise DataError(f"{name} is not JSON: {error}") from None
        if not isinstance(record, dict) or self.options.field not in record:
            keys = ", ".join(record) if isinstance(record, dict) else f"a {type(record).__name__}"
            raise DataError(f"{name} has no field {self.options.field!r} (it has: {keys}); name the text with --field")
        return Document(name, _text(record[self.options.field], name, self.options))


@dataclasses.dataclass(frozen=True)
class Parquet(Source):
    """Parquet tables, with the text in one column."""

    paths: tuple[pathlib.Path, ...]
    options: ReadOptions

    @property
    def num_documents(self) -> int | None:
        return sum(self._open(path).metadata.num_rows for path in self.paths)

    def documents(self) -> Iterator[Document]:
        import pyarrow

        for path in self.paths:
            row = 0
            try:
                for batch in self._open(path).iter_batches(batch_size=256, columns=[self.options.field]):
                    # As bytes, so that invalid UTF-8 is met here, with the row's number at hand.
                    for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                        row += 1
                        yield Document(f"{path}, row {row}", _text(value, f"{path}, row {row}", self.options))
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{path}, after row {row}, cannot be read: {error}") from None

    def _open(self, path: pathlib.Path):
        import pyarrow
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path} is not a Parquet file that can be read: {error}") from None
        if self.options.field not in file.schema_arrow.names:
            columns = ", ".join(file.schema_arrow.names)
            raise DataError(f"{path} has no column {self.options.field!r} (it has: {columns}); name one with --field")
        type_ = file.schema_arrow.field(self.options.field).type
        if type_ not in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary()):
            raise DataError(f"{path}: column {self.options.field!r} must hold text, it is of type {type_}")
        return file


@dataclasses.dataclass(frozen=True)
class HuggingFaceDataset(Source):
    """A data set of the Hugging Face hub, or a local folder that `datasets` understands, streamed."""

    name: str
    config: str | None
    split: str
    options: ReadOptions

    def documents(self) -> Iterator[Document]:
        try:
            import datasets
        except ImportError:
            raise DataError("--source hf:... needs the package `datasets`: pip install datasets") from None
        name = f"data set {self.name}, split {self.split}"
        row = 0
        try:
            rows = datasets.load_dataset(self.name, self.config, split=self.split, streaming=True)
            for row, record in enumerate(rows, start=1):
                if self.options.field not in record:
                    columns = ", ".join(record)
                    raise DataError(f"{name} has no column {self.options.field!r} (it has: {columns}); see --field")
                yield Document(f"{name}, row {row}", _text(record[self.options.field], name, self.options))
        except DataError:
            raise
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"{name}, after row {row}, cannot be read: {error}") from None


@dataclasses.dataclass(frozen=True)
class Recall(Source):
    """Generated documents of the task of `rat_jax.data.recall`, as numbers for the tokenizer `ids:46:0`."""

    count: int

    @property
    def num_documents(self) -> int:
        return self.count

    def documents(self) -> Iterator[Document]:
        for number, ids in enumerate(recall_documents(self.count), start=1):
            yield Document(f"recall, document {number}", " ".join(map(str, ids)))


def python_stdlib(options: ReadOptions) -> TextFiles:
    """The `.py` files of the running Python's standard library, its tests and installed packages left out.

    Real text of some 10 MB that is on every machine. The tests are left out because they repeat each other and
    include files that are deliberately not UTF-8.
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    relative = [path.relative_to(root) for path in root.rglob("*.py")]
    kept = sorted((path for path in relative if not left_out & set(path.parts)), key=pathlib.PurePath.as_posix)
    if not kept:
        raise DataError(
            f"python-stdlib: {root} holds no .py files; this Python was installed without its library's source"
        )
    return TextFiles(tuple(root / path for path in kept), dataclasses.replace(options, document_separator=None))


def parse_source(spec: str, options: ReadOptions) -> Source:
    """The source that a `--source` argument names (`python -m rat_jax.data.prepare --help` lists the forms).

    Raises:
      DataError: if nothing of that name is there.
    """
    match spec.split(":", 1):
        case ["python-stdlib"]:
            return python_stdlib(options)
        case ["text", pattern]:
            return TextFiles(_find(pattern, "*"), options)
        case ["jsonl", pattern]:
            return JsonLines(_find(pattern, "*.json*"), options)
        case ["parquet", pattern]:
            return Parquet(_find(pattern, "*.parquet"), options)
        case ["hf", name]:
            name, config, split = [*name.split(":", 2), "", ""][:3]
            return HuggingFaceDataset(name, config or None, split or "train", options)
        case ["recall", count]:
            if not count.isdecimal() or int(count) < 1:
                raise DataError(f"source {spec}: what stands after the colon is the number of documents")
            return Recall(int(count))
    if spec.endswith((".jsonl", ".jsonl.gz", ".json.gz")):
        return JsonLines(_find(spec, "*"), options)
    if spec.endswith(".parquet"):
        return Parquet(_find(spec, "*"), options)
    return TextFiles(_find(spec, "*"), options)


def _find(pattern: str, names_in_folder: str) -> tuple[pathlib.Path, ...]:
    """The file of that name, the files below a folder, or those a glob pattern matches; sorted."""
    path = pathlib.Path(pattern).expanduser()
    if not pattern:
        found = []
    elif path.is_dir():
        found = [file for file in path.rglob(names_in_folder) if not file.is_dir() and not _is_hidden(file, path)]
    elif path.exists():
        found = [path]
    else:
        found = [pathlib.Path(name) for name in glob.glob(str(path), recursive=True)]
        found = [file for file in found if not file.is_dir()]
    if not found:
        raise DataError(f"source {pattern}: no such file, and no folder or pattern with files {names_in_folder}")
    return tuple(sorted(found, key=pathlib.PurePath.as_posix))


def _is_hidden(file: pathlib.Path, folder: pathlib.Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _text(value: object, name: str, options: ReadOptions) -> str:
    """The text of a field: a missing value is an empty document, anything but text is refused."""
    match value:
        case None:
            return ""
        case bytes():
            return _decode(value, name, options)
        case str():
            return _decode(value.encode(errors="surrogatepass"), name, options)  # JSON may hold halves of a pair
        case _:
            raise DataError(f"{name}: field {options.field!r} must hold text, got {type(value).__name__}")


def _decode(content: bytes, name: str, options: ReadOptions) -> str:
    try:
        return content.decode(errors="strict" if options.invalid_utf8 == "refuse" else "replace")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} {_not_utf8(error)}") from None


def _not_utf8(error: UnicodeDecodeError) -> str:
    return (
        f"is not UTF-8 at byte {error.start} (0x{error.object[error.start]:02x}); "
        f"--invalid_utf8 replace would write U+FFFD there and continue"
    )
