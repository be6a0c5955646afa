"""A prepared corpus: the folder that `python -m rat_jax.data.prepare` writes, and what it says of itself.

metadata.json                               settings, figures of each split
train.bin  validation.bin                   token files
tokenizer_info.json, and its model file     the tokenizer
"""

import dataclasses
import json
import math
import pathlib
from typing import Any, Literal

import numpy as np

from rat_jax.data import DataError
from rat_jax.data.token_file import TokenFile
from rat_jax.data.tokenizer import Tokenizer, load_tokenizer

METADATA_FILE = "metadata.json"
FORMAT_VERSION = 1

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Figures of a split, or of the whole corpus."""

    num_documents: int
    num_tokens: int  # ends of documents included
    num_bytes: int | None  # of the text as UTF-8; None where only token ids were given
    byte_entropy_nats: float | None  # per byte, of the frequencies of single bytes (byte unigrams)

    @property
    def bytes_per_token(self) -> float | None:
        return None if self.num_bytes is None else self.num_bytes / self.num_tokens

    @property
    def num_targets(self) -> int:
        """Tokens that a model predicts: of a document all but the first one, and its end."""
        return self.num_tokens - self.num_documents

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

    @classmethod
    def open(cls, path: pathlib.Path | str) -> "Corpus":
        """Reads the metadata.

        Raises:
          DataError: if the folder is missing or not a prepared corpus.
        """
        path = pathlib.Path(path)
        try:
            values = json.loads((path / METADATA_FILE).read_text())
            if values["format_version"] != FORMAT_VERSION:
                raise DataError(
                    f"{path} has format version {values['format_version']}; this code reads version {FORMAT_VERSION}"
                )
            return cls(
                path=path,
                settings=values["settings"],
                python_version=values["python_version"],
                tokenizer_hash=values["tokenizer_hash"],
                splits={split: Statistics(**values["splits"][split]) for split in SPLITS},
                total=Statistics(**values["total"]),
            )
        except FileNotFoundError:
            raise DataError(
                f"{path} is not a prepared corpus: it has no {METADATA_FILE}; make one with "
                f"`python -m rat_jax.data.prepare --source ... --tokenizer ... --out {path}`"
            ) from None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path / METADATA_FILE} is damaged: {error!r}") from None

    def write_metadata(self) -> None:
        values = dataclasses.asdict(self)
        del values["path"]
        text = json.dumps({"format_version": FORMAT_VERSION, **values}, indent=2)
        (self.path / METADATA_FILE).write_text(text + "\n")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids.

        Raises:
          DataError: if it is missing or another one.
        """
        tokenizer = load_tokenizer(self.path)
        if tokenizer.hash != self.tokenizer_hash:
            raise DataError(f"{self.path}: its tokenizer is not the one that made its tokens (the hashes differ)")
        return tokenizer

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
        """The token file of a split.

        Raises:
          DataError: if it is missing, damaged or made by another tokenizer.
        """
        file = TokenFile.open(self.path / f"{split}.bin")
        if file.header.tokenizer_hash != self.tokenizer_hash:
            raise DataError(f"{file.path} was made by another tokenizer than {self.path} says (the hashes differ)")
        return file


def byte_entropy(counts: np.ndarray) -> float:
    """-sum_b p_b ln p_b in nats, where p_b = counts[b] / sum(counts); 0 if nothing was counted."""
    total = int(counts.sum())
    return -sum(c / total * math.log(c / total) for c in counts.tolist() if c)
