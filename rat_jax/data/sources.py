"""Where text comes from: files, folders, tables, Hugging Face data sets, Python's own standard library.

A source yields its documents one by one and in the same order each time, so that a corpus may be larger than memory.
"""

import abc
import collections
import dataclasses
import pathlib
import sysconfig
from collections.abc import Iterator

from rat_jax.data import DataError
from rat_jax.data.document import Document, FileReader, ReadOptions, field_text, printable
from rat_jax.data.file_search import ending, find_files
from rat_jax.data.json_files import JsonLinesReader, JsonReader
from rat_jax.data.parquet_files import ParquetReader
from rat_jax.data.recall import recall_documents
from rat_jax.data.text_files import TextReader
from rat_jax.data.utf8_file import compression
from rat_jax.paths import split_source

_READERS: dict[str, type[FileReader]] = {  # by the ending of a name; all other files are text
    ".jsonl": JsonLinesReader,
    ".ndjson": JsonLinesReader,
    ".json": JsonReader,
    ".parquet": ParquetReader,
}


class Source(abc.ABC):
    """A sequence of documents."""

    notes: tuple[str, ...] = ()  # what the user should know of how it was found, in a line each

    @property
    def has_records(self) -> bool:
        """Whether what it reads are records of named fields, so that `ReadOptions.read_record` is asked."""
        return True

    @property
    @abc.abstractmethod
    def contents(self) -> dict[str, int]:
        """How many there are of what, in the singular."""

    @property
    def num_documents(self) -> int | None:
        """How many documents there are, where that is known before reading them (for the progress bar)."""
        return None

    @abc.abstractmethod
    def check(self) -> None:
        """Reads the first document of each file.

        Raises:
          DataError: if it cannot be read, or holds no text where it is looked for.
        """

    @abc.abstractmethod
    def documents(self) -> Iterator[Document]:
        """The documents, from the first, in an order that does not change.

        Raises:
          DataError: naming the file, and its line or row, that cannot be read.
        """


@dataclasses.dataclass(frozen=True)
class Files(Source):
    """Files, each with what reads its kind."""

    readers: dict[pathlib.Path, FileReader]
    notes: tuple[str, ...] = ()

    @property
    def has_records(self) -> bool:
        return not any(isinstance(reader, TextReader) for reader in self.readers.values())

    @property
    def contents(self) -> dict[str, int]:
        return dict(collections.Counter(reader.kind for reader in self.readers.values()))

    @property
    def compressions(self) -> dict[str, int]:
        """How many files have which ending of a compression."""
        return dict(collections.Counter(filter(None, map(compression, self.readers))))

    @property
    def num_separated(self) -> int:
        """How many files are cut into documents at a separator."""
        return sum(
            isinstance(reader, TextReader) and reader.options.document_separator is not None
            for reader in self.readers.values()
        )

    @property
    def num_documents(self) -> int | None:
        counts = [reader.num_documents(path) for path, reader in self.readers.items()]
        return None if None in counts else sum(counts)

    def check(self) -> None:
        for path, reader in self.readers.items():
            reader.check(path)

    def documents(self) -> Iterator[Document]:
        for path, reader in self.readers.items():
            yield from reader.documents(path)


@dataclasses.dataclass(frozen=True)
class HuggingFaceDataset(Source):
    """A data set of the Hugging Face hub, or a local folder that `datasets` understands, streamed."""

    name: str
    config: str | None
    split: str
    options: ReadOptions

    @property
    def contents(self) -> dict[str, int]:
        return {"data set": 1}

    def check(self) -> None:
        next(self.documents(), None)

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
                yield Document(f"{name}, row {row}", field_text(record, f"{name}, row {row},", self.options))
        except DataError:
            raise
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"{name}, after row {row}, cannot be read: {printable(error)}") from None


@dataclasses.dataclass(frozen=True)
class Recall(Source):
    """Generated documents of the task of `rat_jax.data.recall`, as numbers for the tokenizer `ids:46:0`."""

    count: int

    @property
    def has_records(self) -> bool:
        return False

    @property
    def num_documents(self) -> int:
        return self.count

    @property
    def contents(self) -> dict[str, int]:
        return {"generated document": self.count}

    def check(self) -> None:
        pass

    def documents(self) -> Iterator[Document]:
        for number, ids in enumerate(recall_documents(self.count), start=1):
            yield Document(f"recall, document {number}", " ".join(map(str, ids)))


def python_stdlib(options: ReadOptions) -> Files:
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
    reader = TextReader(dataclasses.replace(options, document_separator=None))
    return Files({root / path: reader for path in kept})


def parse_source(spec: str, options: ReadOptions) -> Source:
    """The source that a `--source` argument names (`python -m rat_jax.data.prepare --help` lists the forms).

    Raises:
      DataError: if nothing of that name is there.
      PathError: if its path is no path of this machine.
    """
    match split_source(spec):
        case "python-stdlib", "":
            return python_stdlib(options)
        case "text", pattern:
            return _files(pattern, options, TextReader)
        case "jsonl", pattern:
            return _files(pattern, options, JsonLinesReader, JsonReader)
        case "parquet", pattern:
            return _files(pattern, options, ParquetReader)
        case "hf", name:
            name, config, split = [*name.split(":", 2), "", ""][:3]
            return HuggingFaceDataset(name, config or None, split or "train", options)
        case "recall", count:
            if not count.isdecimal() or int(count) < 1:
                raise DataError(f"source {spec}: what stands after the colon is the number of documents")
            return Recall(int(count))
    return _files(spec, options, TextReader, *_READERS.values())


def _files(pattern: str, options: ReadOptions, *kinds: type[FileReader]) -> Files:
    """Files, each read by its ending where that is one of `kinds`; else by the first of them, if named one by one."""

    def reader(path: pathlib.Path) -> type[FileReader]:
        return _READERS.get(ending(path), TextReader)

    readers = {kind: kind(options) for kind in kinds}
    takes_all = TextReader in kinds
    wanted = f"files {', '.join(end for end, kind in _READERS.items() if kind in kinds)}".rstrip()
    notes: list[str] = []
    found = find_files(
        pattern, lambda path: takes_all or reader(path) in kinds, "files" if takes_all else wanted, notes.append
    )
    return Files({path: readers.get(reader(path), readers[kinds[0]]) for path in found}, tuple(notes))
