"""A prepared corpus: the folder that `python -m rat_jax.data.prepare` writes, and what it says of itself.

metadata.json                               settings, figures of each split, hashes of the other files
train.bin  validation.bin                   token files
tokenizer_info.json, and its model file     the tokenizer
chat_template.json                          of chats, if one is known (`rat_jax.data.chat_template`)
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from rat_jax.data import DataError
from rat_jax.data.chat_template import ChatTemplate, load_chat_template
from rat_jax.data.example_figures import Examples
from rat_jax.data.json_object import build, checksum, parse_object, require
from rat_jax.data.token_file import TokenFile
from rat_jax.data.tokenizer import Tokenizer, load_tokenizer, read_info
from rat_jax.files import explain, write_json

METADATA_FILE = "metadata.json"
FORMAT_VERSION = 2
_READ_VERSIONS = (1, FORMAT_VERSION)  # 1 has neither a checksum nor hashes of headers

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Figures of a split, or of the whole corpus."""

    num_documents: int
    num_tokens: int  # ends of documents included, and padding of rows
    num_bytes: int | None  # of the text as UTF-8; None where only token ids were given
    byte_entropy_nats: float | None  # per byte, of the frequencies of single bytes (byte unigrams)
    num_padding: int = 0  # of the tokens, in rows of whole documents, of which `num_documents` counts the pieces

    @property
    def bytes_per_token(self) -> float | None:
        return None if self.num_bytes is None else self.num_bytes / self.num_tokens

    def check(self, name: str) -> None:
        """Refuses figures that no text has."""
        require(self.num_tokens >= 1, name, f"num_tokens is {self.num_tokens}")
        require(0 <= self.num_documents <= self.num_tokens, name, f"num_documents is {self.num_documents}")
        padding = self.num_padding
        require(0 <= padding <= self.num_tokens - self.num_documents, name, f"num_padding is {padding}")
        require(self.num_bytes is None or self.num_bytes >= 0, name, f"num_bytes is {self.num_bytes}")
        entropy = self.byte_entropy_nats
        require(entropy is None or 0 <= entropy < math.log(257), name, f"byte_entropy_nats is {entropy}")

    @property
    def num_targets(self) -> int:
        """Tokens that a model predicts: of a document all but the first one, and its end."""
        return self.num_tokens - self.num_documents - self.num_padding

    def bits_per_byte(self, loss: float, first_target_id: int = 0) -> float | None:
        """nats of all targets / (ln 2 * bytes of the text they are of): of the text, whatever the tokenizer.

        Ends of documents are targets, and no bytes; first tokens of documents are bytes, and no targets. So on the
        whole split this is (loss * targets) / (ln 2 * bytes of its text), to the last digit. Of a part of the split
        the bytes are not counted: they are taken to be as many a target as in all of it.

        Args:
          loss: mean over the targets that were measured, in nats.
          first_target_id: of `DataConfig`. Where targets are left out, there is no loss of the text.

        Returns:
          None where the text's bytes are not known, or not all of them are predicted.
        """
        if not self.num_bytes or self.num_targets < 1 or first_target_id > 0:
            return None
        return loss * self.num_targets / (math.log(2) * self.num_bytes)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A prepared corpus, open for reading."""

    path: pathlib.Path
    settings: dict[str, Any]  # of the command that made it
    python_version: str  # that ran it: what `python-stdlib` stands for
    tokenizer_hash: str
    splits: dict[Split, Statistics]
    total: Statistics  # of both splits together; its byte entropy is what a loss is compared with
    header_hashes: dict[Split, str] | None = None  # of the token files; None: not written yet, or format 1
    examples: Examples | None = None  # None: the token files hold documents

    @classmethod
    def open(cls, path: pathlib.Path | str) -> "Corpus":
        """Reads the metadata.

        Raises:
          DataError: if the folder is missing or not a prepared corpus, or its metadata were changed.
        """
        path = pathlib.Path(path)
        file = path / METADATA_FILE
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            raise DataError(
                f"{path} is not a prepared corpus: it has no {METADATA_FILE}; make one with "
                f"`python -m rat_jax.data.prepare --source ... --tokenizer ... --out {path}`"
            ) from None
        except OSError as error:
            raise DataError(f"{file} cannot be read: {explain(error)}") from None
        name = str(file)
        values = parse_object(content, name)
        version = values.pop("format_version", None)
        if type(version) is not int or version not in _READ_VERSIONS:
            known = " and ".join(map(str, _READ_VERSIONS))
            raise DataError(f"{file} has format version {version!r}; this code reads versions {known}")
        if version == FORMAT_VERSION:
            written = values.pop("checksum", None)
            require(written == checksum(values), name, "its checksum is another one: it was changed after it was made")
        fields = build(_Metadata, values, name)
        hashes = fields.header_hashes
        require((hashes is not None) == (version == FORMAT_VERSION), name, "header_hashes are of another version")
        for field in ("splits", "header_hashes"):
            parts = getattr(fields, field)
            require(parts is None or set(parts) == set(SPLITS), name, f"{field} are not of train and validation")
        splits = {split: build(Statistics, fields.splits[split], f"{name}, {split}") for split in SPLITS}
        corpus = cls(
            path=path,
            settings=fields.settings,
            python_version=fields.python_version,
            tokenizer_hash=fields.tokenizer_hash,
            splits=splits,
            total=build(Statistics, fields.total, f"{name}, total"),
            header_hashes=hashes,
            examples=None if fields.examples is None else Examples.of(fields.examples, f"{name}, examples"),
        )
        corpus._check_figures(name)
        return corpus

    def _check_figures(self, name: str) -> None:
        for part, figures in [*self.splits.items(), ("total", self.total)]:
            figures.check(f"{name}, {part}")
        for field in ("num_documents", "num_tokens", "num_bytes", "num_padding"):
            parts = [getattr(figures, field) for figures in self.splits.values()]
            total = None if None in parts else sum(parts)
            require(getattr(self.total, field) == total, name, f"{field} of the splits do not add up to the total")

    def write_metadata(self) -> None:
        """Writes the metadata beside the token files, which must be there."""
        values: dict[str, Any] = {"format_version": FORMAT_VERSION}
        values |= {field.name: getattr(self, field.name) for field in dataclasses.fields(_Metadata)}
        values["splits"] = {split: dataclasses.asdict(self.splits[split]) for split in SPLITS}
        values["total"] = dataclasses.asdict(self.total)
        values["examples"] = None if self.examples is None else dataclasses.asdict(self.examples)
        values["header_hashes"] = {split: TokenFile.open(self._token_path(split)).header_hash for split in SPLITS}
        contents = {name: value for name, value in values.items() if name != "format_version"}
        write_json(self.path / METADATA_FILE, values | {"checksum": checksum(contents)})

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids.

        Raises:
          DataError: if it is missing or another one.
        """
        tokenizer = load_tokenizer(self.path)
        self._check_tokenizer_hash(tokenizer.hash)
        return tokenizer

    def chat_template(self) -> ChatTemplate | None:
        """What made texts of chats; None if there were none.

        Raises:
          DataError: if it is missing or another one.
        """
        template = load_chat_template(self.path)
        if (None if template is None else template.hash) != self.chat_template_hash:
            raise DataError(f"{self.path}: its chat template is not the one that made its tokens (the hashes differ)")
        return template

    @property
    def chat_template_hash(self) -> str | None:
        """Of what made texts of chats; None if there were none."""
        return None if self.examples is None else self.examples.chat_template_hash

    def _check_tokenizer_hash(self, tokenizer_hash: str) -> None:
        if tokenizer_hash != self.tokenizer_hash:
            raise DataError(f"{self.path}: its tokenizer is not the one that made its tokens (the hashes differ)")

    def check_tokenizer(self, folder: pathlib.Path) -> None:
        """Refuses tokens that another tokenizer made than the one that a run's folder holds, if it holds one.

        Raises:
          DataError: naming both folders.
        """
        if folder.is_dir() and load_tokenizer(folder).hash != self.tokenizer_hash:
            raise DataError(
                f"{self.path} was made by another tokenizer than the model's, which is in {folder}: use data that was "
                f"prepared with `--tokenizer {folder}`"
            )

    def token_file(self, split: Split) -> TokenFile:
        """The token file of a split; its ids are checked as they are read.

        Raises:
          DataError: if it is missing, damaged, of another split or corpus, or made by another tokenizer.
        """
        file = TokenFile.open(self._token_path(split))
        header = file.header
        if header.name not in (None, file.path.name):
            raise DataError(f"{file.path} is a file that was written as {header.name}: files were swapped or renamed")
        if header.tokenizer_hash != self.tokenizer_hash:
            raise DataError(f"{file.path} was made by another tokenizer than {self.path} says (the hashes differ)")
        if self.header_hashes is not None and file.header_hash != self.header_hashes[split]:
            raise DataError(
                f"{file.path} is not the file that {self.path / METADATA_FILE} describes: it was replaced, or its "
                f"header changed; restore it, or prepare the corpus again"
            )
        row_tokens = None if self.examples is None else self.examples.seq_len
        if header.row_tokens != row_tokens:
            raise DataError(
                f"{file.path} has row_tokens {header.row_tokens}, but {self.path / METADATA_FILE} says {row_tokens}: "
                f"files were swapped or replaced"
            )
        figures = self.splits[split]
        for field in ("num_tokens", "num_documents"):
            if getattr(header, field) != getattr(figures, field):
                raise DataError(
                    f"{file.path} has {field} {getattr(header, field)}, but {self.path / METADATA_FILE} says "
                    f"{getattr(figures, field)}: files were swapped or replaced"
                )
        info = read_info(self.path)
        self._check_tokenizer_hash(info.hash)
        for field in ("vocab_size", "eos_id"):
            if getattr(header, field) != getattr(info, field):
                raise DataError(
                    f"{file.path} has {field} {getattr(header, field)}, but the tokenizer beside it "
                    f"{getattr(info, field)}: its header was changed; restore it, or prepare the corpus again"
                )
        return file

    def verify(
        self,
        *,
        max_bytes: int | None = None,
        progress: Callable[[int], None] = lambda num_bytes: None,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Reads all ids of both splits and compares them with what was written.

        Args:
          max_bytes: leaves out splits whose ids take more; the blocks of those are checked as they are read, but in
            format 1.
          progress: called with the number of bytes of each piece.
          say: called with a message where large ids of format 1 stay unchecked.

        Raises:
          DataError: naming the file and, but in format 1, the block that was changed.
        """
        for split in SPLITS:
            file = self.token_file(split)
            if max_bytes is None or file.header.num_bytes <= max_bytes:
                file.verify(progress)
            elif file.header.digests_hash is None:
                say(f"{file.path} is of format 1, so that its ids are not checked: prepare the corpus again")

    def _token_path(self, split: Split) -> pathlib.Path:
        return self.path / f"{split}.bin"


@dataclasses.dataclass(frozen=True)
class _Metadata:
    """What metadata.json holds, in its order, beside version and checksum."""

    settings: dict[str, Any]
    python_version: str
    tokenizer_hash: str
    splits: dict[str, Any]
    total: dict[str, Any]
    header_hashes: dict[str, Any] | None = None
    examples: dict[str, Any] | None = None


def byte_entropy(counts: np.ndarray) -> float:
    """-sum_b p_b ln p_b in nats, where p_b = counts[b] / sum(counts); 0 if nothing was counted."""
    total = int(counts.sum())
    return -sum(c / total * math.log(c / total) for c in counts.tolist() if c)
