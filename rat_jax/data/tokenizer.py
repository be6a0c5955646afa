"""Tokenizers: text to token ids and back.

A tokenizer travels with the tokens it made: `save` writes it into their folder, `load_tokenizer` reads it from there,
and its `hash` is in the header of every token file. The two model formats are read by the packages `tokenizers` and
`sentencepiece`, imported where they are used, so that bytes need neither. Published files are read by
`rat_jax.data.tokenizer_files`.
"""

import abc
import contextlib
import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from rat_jax.data import DataError
from rat_jax.data.json_object import build, is_digest, parse_object, require
from rat_jax.files import explain, write_bytes, write_json

INFO_FILE = "tokenizer_info.json"
MODEL_FILES = {"huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model"}  # by kind
BPE_EOS_TOKEN = "<|endoftext|>"
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")

# As GPT-2's: of spaces between words the last belongs to the word that follows.
_PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_PIECE_CHARACTERS = 1 << 20
_WORD_END = re.compile(r"(?<=\S)(?=[ \n]\S)")  # certain: of several spaces, some would be a word of their own
_NO_WORD = re.compile(r"(?:(?!\s)[\W_])*")
# Letters and digits, other signs, or space: in a thousand of one kind there is no end of a word, or hardly one.
_LONG_WORD = re.compile(r"[^\W_]{1000}|(?:(?!\s)[\W_]){1000}|\s{1000}")


class Tokenizer(abc.ABC):
    """Turns text into ids below `vocab_size` and back. Text never encodes to `eos_id`, which only ends documents."""

    byte_ids: frozenset[int] = frozenset()
    """Ids of single bytes that `decode` turns into text by whole runs: a byte can change the text of those before."""

    kind: str
    vocab_size: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, with nothing added before or after.

        Raises:
          DataError: if `text` holds half of a surrogate pair, which is no character, if the tokenizer has no ids for
            it, or if `eos_id` is among them.
        """
        to_utf8(text)
        ids = self.encode_unchecked(text)
        if self.eos_id in ids:
            stop = self._end_position(text)
            raise DataError(
                f"a text holds {text[max(0, stop - 60) : stop]!r} (characters up to {stop}), which becomes "
                f"{self.eos_id}, the id that ends a document: take it out of the text, or use a tokenizer in which it "
                f"is a control token"
            )
        return ids

    def _end_position(self, text: str) -> int:
        """The length of a text that has `eos_id` among its ids and, with the last character left out, has not."""
        without, stop = 0, len(text)
        while stop - without > 1:
            middle = (without + stop) // 2
            if self.eos_id in self.encode_unchecked(text[:middle]):
                stop = middle
            else:
                without = middle
        return stop

    @abc.abstractmethod
    def encode_unchecked(self, text: str) -> list[int]:
        """The ids of a text of whole characters; `eos_id` may be among them."""

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
        return _hash(self.kind, self.vocab_size, self.eos_id, b"" if self.model is None else self.model[1])

    def save(self, folder: pathlib.Path | str) -> None:
        """Writes the tokenizer into `folder`, for `load_tokenizer`."""
        folder = pathlib.Path(folder)
        if self.model is not None:
            write_bytes(folder / self.model[0], self.model[1])
        info = TokenizerInfo(self.kind, self.vocab_size, self.eos_id, self.hash)
        write_json(folder / INFO_FILE, dataclasses.asdict(info))


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
    """What a saved tokenizer says of itself."""

    kind: str
    vocab_size: int
    eos_id: int
    hash: str  # of `Tokenizer.hash`


@dataclasses.dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """UTF-8 bytes, and 256 for the end of a document."""

    kind = "bytes"
    vocab_size = 257
    eos_id = 256
    model = None

    def encode_unchecked(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_document(self, text: str) -> np.ndarray:
        ids = np.frombuffer(to_utf8(text), np.uint8).astype(np.uint16)
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

    def encode_unchecked(self, text: str) -> list[int]:
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise DataError(f"this tokenizer reads token ids separated by spaces, not text: {error}") from None
        _check_ids(ids, self.vocab_size)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        _check_ids(ids, self.vocab_size)
        return "".join(f"{int(i)} " for i in ids if i != self.eos_id)


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` package, without the special tokens it may add around a text."""

    kind = "huggingface"

    def __init__(self, content: bytes, eos_id: int):
        """Raises a `DataError` if `content` is not a `tokenizer.json`."""
        import tokenizers

        self._content = content
        with library_errors("this is not a tokenizer.json"):
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a text is text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)
        self.byte_ids = frozenset(i for token, i in vocabulary.items() if _BYTE_TOKEN.fullmatch(token))
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
        return MODEL_FILES[self.kind], self._content

    def encode_unchecked(self, text: str) -> list[int]:
        with library_errors(f"the tokenizer has no ids for the text {text[:60]!r}"):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_document(self, text: str) -> np.ndarray:
        if not self._sees_words_alone:
            return super().encode_document(text)
        dtype = token_dtype(self.vocab_size)  # by pieces, because a long text would cost memory many times its size
        return np.concatenate([np.asarray(ids, dtype) for ids in (*map(self.encode, _pieces(text)), [self.eos_id])])

    def decode(self, ids: Sequence[int]) -> str:
        _check_ids(ids, self.vocab_size)
        with library_errors("the tokenizer cannot decode some ids"):
            return self._tokenizer.decode([int(i) for i in ids if i != self.eos_id], skip_special_tokens=False)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; with LLaMA-2's, the RAT paper's recipe: no BOS, EOS (2) after each document."""

    kind = "sentencepiece"

    def __init__(self, content: bytes, eos_id: int):
        """Raises a `DataError` if `content` is not a SentencePiece model."""
        import sentencepiece

        self._content = content
        with library_errors("this is not a SentencePiece model"):
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.vocab_size = self._processor.vocab_size()
        self.eos_id = eos_id
        _check_ids([eos_id], self.vocab_size)

    def __reduce__(self):
        return SentencePieceTokenizer, (self._content, self.eos_id)

    @property
    def model(self) -> tuple[str, bytes]:
        return MODEL_FILES[self.kind], self._content

    def encode_unchecked(self, text: str) -> list[int]:
        with library_errors(f"the tokenizer has no ids for the text {text[:60]!r}"):
            return self._processor.encode(text, add_bos=False, add_eos=False)

    def decode(self, ids: Sequence[int]) -> str:
        _check_ids(ids, self.vocab_size)
        with library_errors("the tokenizer cannot decode some ids"):
            return self._processor.decode([int(i) for i in ids if i != self.eos_id])


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype of ids below `vocab_size` on disk, little endian: uint16 where they fit, else uint32."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def load_tokenizer(folder: pathlib.Path | str) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into `folder`.

    Raises:
      DataError: if the folder holds none, or one that was changed.
    """
    folder = pathlib.Path(folder)
    info = read_info(folder)
    name = MODEL_FILES.get(info.kind)
    content = b"" if name is None else _read_file(folder, name)
    # Before any library sees the content: what it says of damaged files is of no use.
    if _hash(info.kind, info.vocab_size, info.eos_id, content) != info.hash:
        raise DataError(
            f"{folder}: the tokenizer is not the one that was saved there (its hash differs); {INFO_FILE}"
            f"{'' if name is None else f' or {name}'} was changed"
        )
    try:
        tokenizer = _make(info, content)
    except DataError as error:
        raise DataError(f"the tokenizer in {folder} cannot be used: {error}") from None
    require(tokenizer.hash == info.hash, str(folder / INFO_FILE), f"this is no tokenizer of kind {info.kind}")
    return tokenizer


def _make(info: TokenizerInfo, content: bytes) -> Tokenizer:
    match info.kind:
        case "bytes":
            return ByteTokenizer()
        case "ids":
            return IdTokenizer(info.vocab_size, info.eos_id)
        case "huggingface":
            return HuggingFaceTokenizer(content, info.eos_id)
        case "sentencepiece":
            return SentencePieceTokenizer(content, info.eos_id)
    raise DataError(f"unknown kind {info.kind!r}")


def read_info(folder: pathlib.Path) -> TokenizerInfo:
    """What the tokenizer in `folder` says of itself.

    Raises:
      DataError: if the folder holds none, or what it says cannot be.
    """
    name = str(folder / INFO_FILE)
    info = build(TokenizerInfo, parse_object(_read_file(folder, INFO_FILE), name), name)
    require(info.kind in ("bytes", "ids", *MODEL_FILES), name, f"unknown kind of tokenizer {info.kind[:80]!r}")
    require(0 <= info.eos_id < info.vocab_size <= 2**32, name, f"eos_id {info.eos_id}, vocab_size {info.vocab_size}")
    require(is_digest(info.hash), name, "hash is no SHA-256")
    return info


def _read_file(folder: pathlib.Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{folder} holds no tokenizer: {folder / name} is missing") from None
    except OSError as error:
        raise DataError(f"{folder / name} cannot be read: {explain(error)}") from None


def _hash(kind: str, vocab_size: int, eos_id: int, content: bytes) -> str:
    return hashlib.sha256(f"{kind} {vocab_size} {eos_id}\n".encode() + content).hexdigest()


@contextlib.contextmanager
def library_errors(message: str) -> Iterator[None]:
    """Turns what a tokenizer's package raises into a `DataError`: "MESSAGE: why".

    Their errors have no class of their own: plain `Exception`, and of Rust's panics one that is no `Exception`.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{message}: {' '.join(str(error).split())[:300] or type(error).__name__}") from None


def to_utf8(text: str) -> bytes:
    """A text as UTF-8.

    Raises:
      DataError: if it holds half of a surrogate pair.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        start = max(0, error.start - 30)
        raise DataError(
            f"a text holds half of a surrogate pair, which is no character, in "
            f"{text[start : error.start + 30]!r} (character {error.start}): leave it out"
        ) from None


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


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    for position, i in enumerate(ids):
        if not 0 <= i < vocab_size:
            raise DataError(f"token id {i} at position {position} is outside the vocabulary of {vocab_size}")
