"""Tokenizers: text to token ids and back.

A tokenizer travels with the tokens it made: `save` writes it into their folder, `load_tokenizer` reads it from there,
and its `hash` is in the header of every token file. The two model formats are read by the packages `tokenizers` and
`sentencepiece`, imported where they are used, so that bytes need neither.
"""

import abc
import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from rat_jax.data import DataError

INFO_FILE = "tokenizer_info.json"
BPE_EOS_TOKEN = "<|endoftext|>"

# As GPT-2's: of spaces between words the last belongs to the word that follows.
_PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_PIECE_CHARACTERS = 1 << 20
_WORD_END = re.compile(r"(?<=\S)(?=[ \n]\S)")  # certain: of several spaces, some would be a word of their own
_NO_WORD = re.compile(r"(?:(?!\s)[\W_])*")
# Letters and digits, other signs, or space: in a thousand of one kind there is no end of a word, or hardly one.
_LONG_WORD = re.compile(r"[^\W_]{1000}|(?:(?!\s)[\W_]){1000}|\s{1000}")


class Tokenizer(abc.ABC):
    """Turns text into ids below `vocab_size` and back. Text never encodes to `eos_id`, which only ends documents."""

    kind: str
    vocab_size: int
    eos_id: int

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`, with nothing added before or after."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; `eos_id` stands for no text. Bytes that are no character become U+FFFD."""

    def encode_document(self, text: str) -> np.ndarray:
        """The ids of `text` and then `eos_id`, in the dtype of a token file."""
        return np.asarray([*self.encode(text), self.eos_id], dtype=token_dtype(self.vocab_size))

    @property
    @abc.abstractmethod
    def model(self) -> tuple[str, bytes] | None:
        """Name and content of the file that defines the tokenizer; None if `kind` and the sizes say it all."""

    @property
    def hash(self) -> str:
        """SHA-256, in hexadecimal, of all that decides which ids a text gets."""
        digest = hashlib.sha256(f"{self.kind} {self.vocab_size} {self.eos_id}\n".encode())
        if self.model is not None:
            digest.update(self.model[1])
        return digest.hexdigest()

    def save(self, folder: pathlib.Path | str) -> None:
        """Writes the tokenizer into `folder`, for `load_tokenizer`."""
        folder = pathlib.Path(folder)
        if self.model is not None:
            (folder / self.model[0]).write_bytes(self.model[1])
        info = {"kind": self.kind, "vocab_size": self.vocab_size, "eos_id": self.eos_id, "hash": self.hash}
        (folder / INFO_FILE).write_text(json.dumps(info, indent=2) + "\n")


@dataclasses.dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """UTF-8 bytes, and 256 for the end of a document."""

    kind = "bytes"
    vocab_size = 257
    eos_id = 256
    model = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_document(self, text: str) -> np.ndarray:
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.uint16)
        return np.append(ids, np.uint16(self.eos_id))

    def decode(self, ids: Sequence[int]) -> str:
        _check_ids(ids, self.vocab_size)
        return bytes(i for i in ids if i != self.eos_id).decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class IdTokenizer(Tokenizer):
    """Ids written as numbers, `"12 7 931"`: for token files whose tokenizer is not at hand, and synthetic tasks."""

    vocab_size: int
    eos_id: int
    kind = "ids"
    model = None

    def __post_init__(self):
        if not 0 <= self.eos_id < self.vocab_size:
            raise DataError(
                f"tokenizer ids: the end of a document, {self.eos_id}, is outside 0 .. {self.vocab_size - 1}"
            )

    def encode(self, text: str) -> list[int]:
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise DataError(f"this tokenizer reads token ids separated by spaces, not text: {error}") from None
        _check_ids(ids, self.vocab_size)
        if self.eos_id in ids:
            raise DataError(f"text may not hold {self.eos_id}, the id that ends a document")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        _check_ids(ids, self.vocab_size)
        return "".join(f"{int(i)} " for i in ids if i != self.eos_id)


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` package, without the special tokens it may add around a text."""

    kind = "huggingface"

    def __init__(self, content: bytes, eos_id: int):
        import tokenizers

        self._content = content
        self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a text is text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.eos_id = eos_id
        _check_ids([eos_id], self.vocab_size)
        parts = json.loads(content)
        added = parts.get("added_tokens", [])
        self._sees_words_alone = (
            parts.get("pre_tokenizer") == _PRE_TOKENIZER
            and parts.get("normalizer") is None
            and all(token["special"] for token in added)  # which is text inside a text
        )

    def __reduce__(self):
        return HuggingFaceTokenizer, (self._content, self.eos_id)

    @property
    def model(self) -> tuple[str, bytes]:
        return "tokenizer.json", self._content

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_document(self, text: str) -> np.ndarray:
        if not self._sees_words_alone:
            return super().encode_document(text)
        dtype = token_dtype(self.vocab_size)  # by pieces, because a long text would cost memory many times its size
        return np.concatenate([np.asarray(ids, dtype) for ids in (*map(self.encode, _pieces(text)), [self.eos_id])])

    def decode(self, ids: Sequence[int]) -> str:
        _check_ids(ids, self.vocab_size)
        return self._tokenizer.decode([int(i) for i in ids if i != self.eos_id], skip_special_tokens=False)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; with LLaMA-2's, the RAT paper's recipe: no BOS, EOS (2) after each document."""

    kind = "sentencepiece"

    def __init__(self, content: bytes, eos_id: int):
        import sentencepiece

        self._content = content
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.vocab_size = self._processor.vocab_size()
        self.eos_id = eos_id
        _check_ids([eos_id], self.vocab_size)

    def __reduce__(self):
        return SentencePieceTokenizer, (self._content, self.eos_id)

    @property
    def model(self) -> tuple[str, bytes]:
        return "tokenizer.model", self._content

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text, add_bos=False, add_eos=False)

    def decode(self, ids: Sequence[int]) -> str:
        _check_ids(ids, self.vocab_size)
        return self._processor.decode([int(i) for i in ids if i != self.eos_id])


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype of ids below `vocab_size` on disk, little endian: uint16 where they fit, else uint32."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def load_tokenizer(folder: pathlib.Path | str) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into `folder`.

    Raises:
      DataError: if the folder holds none, or its model file is not the one that was saved.
    """
    folder = pathlib.Path(folder)
    try:
        info = json.loads((folder / INFO_FILE).read_text())
        match info["kind"]:
            case "bytes":
                tokenizer = ByteTokenizer()
            case "ids":
                tokenizer = IdTokenizer(info["vocab_size"], info["eos_id"])
            case "huggingface":
                tokenizer = HuggingFaceTokenizer((folder / "tokenizer.json").read_bytes(), info["eos_id"])
            case "sentencepiece":
                tokenizer = SentencePieceTokenizer((folder / "tokenizer.model").read_bytes(), info["eos_id"])
            case kind:
                raise DataError(f"{folder / INFO_FILE}: unknown kind of tokenizer {kind!r}")
    except FileNotFoundError as error:
        raise DataError(f"{folder} holds no tokenizer: {error.filename} is missing") from None
    except (json.JSONDecodeError, KeyError) as error:
        raise DataError(f"{folder / INFO_FILE} is damaged: {error!r}") from None
    if tokenizer.hash != info["hash"]:
        raise DataError(
            f"{folder}: the tokenizer is not the one that was saved there (its hash differs); its file was changed"
        )
    return tokenizer


def read_tokenizer(path: pathlib.Path | str, eos_token: str | None) -> Tokenizer:
    """A tokenizer from a SentencePiece `.model` file, a Hugging Face `tokenizer.json` or the folder of a corpus.

    Args:
      path: of the file, by any other name than `.model` a `tokenizer.json`, or of a folder that `prepare` made.
      eos_token: what ends a document, as the tokenizer writes it. None takes it from the `.model` file, or from the
        `tokenizer_config.json` beside a `tokenizer.json`.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        if eos_token is not None:
            raise DataError(f"{path} says which token ends a document: leave --eos_token out")
        return load_tokenizer(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer {path} cannot be read: {error.strerror}") from None
    if path.suffix == ".model":
        return _read_sentencepiece(path, content, eos_token)
    return _read_huggingface(path, content, eos_token)


def check_bpe_size(vocab_size: int) -> None:
    """Refuses the size of a BPE that cannot hold every byte."""
    if vocab_size < 257:
        raise DataError(f"a BPE holds at least the 256 bytes and the end of a document: bpe:{vocab_size} is below 257")


def train_bpe(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """A byte-level BPE of exactly `vocab_size` tokens, `<|endoftext|>` (id 0) and the 256 bytes among them.

    For the training alone, words of more than 1,000 characters (a blob in base64, a line of dashes) are cut: a merge
    costs the trainer the length of each word that holds it.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    check_bpe_size(vocab_size)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BPE_EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _training_pieces(text)), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(
            f"the corpus is too small for bpe:{vocab_size}: no pair of tokens is left to merge at "
            f"{tokenizer.get_vocab_size()}; use bpe:{tokenizer.get_vocab_size()} or less"
        )
    return HuggingFaceTokenizer(tokenizer.to_str().encode(), tokenizer.token_to_id(BPE_EOS_TOKEN))


def _pieces(text: str) -> Iterator[str]:
    """Pieces that together are `text`, each of whole words as `_PRE_TOKENIZER` finds them in `text`.

    A tokenizer needs some hundred bytes of memory for each character of a piece.
    """
    start = 0
    while start < len(text):
        end = start + _PIECE_CHARACTERS
        word_end = _WORD_END.search(text, end) if end < len(text) else None
        end = len(text) if word_end is None else word_end.end()
        yield text[start:end]
        start = end


def _training_pieces(text: str) -> Iterator[str]:
    """Pieces that together are `text`, cut in long words as well."""
    for piece in _pieces(text):
        cuts = [match.end() for match in _LONG_WORD.finditer(piece)] if _may_have_long_word(piece) else []
        yield from (piece[a:b] for a, b in itertools.pairwise([0, *cuts, len(piece)]) if a < b)


def _may_have_long_word(text: str) -> bool:
    """Whether a match of `_LONG_WORD` is possible: it would cover one of these slices whole."""
    slices = (text[start : start + 500] for start in range(0, len(text) - 499, 500))
    return any(part.isalnum() or part.isspace() or _NO_WORD.fullmatch(part) for part in slices)


def _read_sentencepiece(path: pathlib.Path, content: bytes, eos_token: str | None) -> SentencePieceTokenizer:
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise DataError(f"tokenizer {path} is not a SentencePiece model: {error}") from None
    eos_id = processor.eos_id() if eos_token is None else processor.piece_to_id(eos_token)
    if eos_id < 0 or (eos_token is not None and processor.id_to_piece(eos_id) != eos_token):
        raise DataError(f"tokenizer {path} has no token {eos_token or '</s>'}; name its last token with --eos_token")
    return SentencePieceTokenizer(content, eos_id)


def _read_huggingface(path: pathlib.Path, content: bytes, eos_token: str | None) -> HuggingFaceTokenizer:
    import tokenizers

    config_path = path.parent / "tokenizer_config.json"
    if eos_token is None and config_path.is_file():
        eos_token = json.loads(config_path.read_text()).get("eos_token")
        if isinstance(eos_token, dict):
            eos_token = eos_token["content"]
    if eos_token is None:
        raise DataError(f"{path} does not say which token ends a document: name it with --eos_token")
    try:
        eos_id = tokenizers.Tokenizer.from_buffer(content).token_to_id(eos_token)
    except ValueError as error:
        raise DataError(f"tokenizer {path} is not a tokenizer.json: {error}") from None
    if eos_id is None:
        raise DataError(
            f"tokenizer {path} has no token {eos_token!r}; name the one that ends a document with --eos_token"
        )
    return HuggingFaceTokenizer(content, eos_id)


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    for position, i in enumerate(ids):
        if not 0 <= i < vocab_size:
            raise DataError(f"token id {i} at position {position} is outside the vocabulary of {vocab_size}")
