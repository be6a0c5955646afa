"""Tokenizers as they are published: SentencePiece's `.model` and Hugging Face's `tokenizer.json`."""

import base64
import contextlib
import json
import pathlib
import re

from rat_jax.data import DataError
from rat_jax.data.json_object import parse_object, read_bytes
from rat_jax.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    library_errors,
    load_tokenizer,
)

_UNKNOWN = "\ue000\U000f0000\U0010fffd"  # private characters, which no vocabulary is likely to hold


def read_tokenizer(path: pathlib.Path | str, eos_token: str | None) -> Tokenizer:
    """A tokenizer from a SentencePiece `.model` file, a Hugging Face `tokenizer.json` or the folder of a corpus.

    Args:
      path: of the file, by any other name than `.model` a `tokenizer.json`, or of a folder that `prepare` made.
      eos_token: what ends a document, as the tokenizer writes it. None takes it from the `.model` file, or from the
        `tokenizer_config.json` beside a `tokenizer.json`.

    Raises:
      DataError: if the file is damaged or of another format, does not say what ends a document, or has for it a token
        that text can hold as well.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        if eos_token is not None:
            raise DataError(f"{path} says which token ends a document: leave --eos_token out")
        return load_tokenizer(path)
    content = read_bytes(path)
    _refuse_other_formats(path, content)
    if path.suffix == ".model":
        return _read_sentencepiece(path, content, eos_token)
    return _read_huggingface(path, content, eos_token)


def _refuse_other_formats(path: pathlib.Path, content: bytes) -> None:
    if content.startswith(b"version https://git-lfs"):
        raise DataError(f"tokenizer {path} is a pointer of Git LFS, not the file: fetch it with `git lfs pull`")
    if content[:512].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise DataError(
            f"tokenizer {path} is a web page, not the file: download it again, signed in where that is asked"
        )
    if _is_tiktoken(content):
        raise DataError(
            f"tokenizer {path} is of tiktoken's format (LLaMA 3), which lacks the pattern that cuts text into words "
            f"and the special tokens: use the tokenizer.json that is published for the same model"
        )
    if content.startswith(b"{") and b'"token_bytes"' in content[:4096]:
        raise DataError(f"tokenizer {path} is of Mistral's format Tekken: use the tokenizer.json of the same model")


def _is_tiktoken(content: bytes) -> bool:
    """Whether the file's lines are tokens in base64 and their ranks."""
    first = re.match(rb"([A-Za-z0-9+/]+={0,2}) [0-9]+\r?\n", content)
    if first is None:
        return False
    with contextlib.suppress(ValueError):
        return bool(base64.b64decode(first[1], validate=True))
    return False


def _read_sentencepiece(path: pathlib.Path, content: bytes, eos_token: str | None) -> SentencePieceTokenizer:
    import sentencepiece

    with library_errors(f"tokenizer {path} is not a SentencePiece model"):
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        eos_id = processor.eos_id() if eos_token is None else processor.piece_to_id(eos_token)
        is_there = 0 <= eos_id < processor.vocab_size()
        piece = processor.id_to_piece(eos_id) if is_there else None
    if piece is None or eos_token not in (None, piece):
        raise DataError(f"tokenizer {path} has no token {eos_token or '</s>'}; name its last token with --eos_token")
    if not processor.is_control(eos_id):
        raise DataError(
            f"tokenizer {path}: {piece!r} cannot end documents, since it is not a control symbol of this model and may "
            f"stand in texts; name one with --eos_token"
        )
    tokenizer = SentencePieceTokenizer(content, eos_id)
    _refuse_end_in_text(path, tokenizer, piece)
    return tokenizer


def _read_huggingface(path: pathlib.Path, content: bytes, eos_token: str | None) -> HuggingFaceTokenizer:
    import tokenizers

    _refuse_prefix(path, content)
    with library_errors(f"tokenizer {path} is not a tokenizer.json"):
        model = tokenizers.Tokenizer.from_buffer(content)
    eos_token = eos_token or _configured_end(path.parent / "tokenizer_config.json")
    if eos_token is None:
        raise DataError(f"{path} does not say which token ends a document: name it with --eos_token")
    eos_id = model.token_to_id(eos_token)
    if eos_id is None:
        raise DataError(
            f"tokenizer {path} has no token {eos_token!r}; name the one that ends a document with --eos_token"
        )
    tokenizer = HuggingFaceTokenizer(content, eos_id)
    _refuse_end_in_text(path, tokenizer, eos_token)
    return tokenizer


def _refuse_prefix(path: pathlib.Path, content: bytes) -> None:
    """Refuses a BPE whose merges lack its `continuing_subword_prefix`, at which the library ends the process."""
    try:
        model = json.loads(content)["model"]
        prefix, merges = model["continuing_subword_prefix"], model["merges"]
        seconds = [(merge.split(" ") if isinstance(merge, str) else merge)[1] for merge in merges] if prefix else []
        fits = all(second.startswith(prefix) for second in seconds)
    except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):  # the library says what it is
        return
    if not fits:
        raise DataError(
            f"tokenizer {path} is damaged: model.continuing_subword_prefix is {prefix[:20]!r}, with which its merges "
            f"do not begin"
        )


def _configured_end(path: pathlib.Path) -> str | None:
    """The `eos_token` of a `tokenizer_config.json`; None if there is no such file, or it names none."""
    if not path.is_file():
        return None
    token = parse_object(read_bytes(path), str(path)).get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    if not isinstance(token, str | None) or token == "":
        raise DataError(f"{path} is damaged: eos_token is neither text nor an object with the text as `content`")
    return token


def _refuse_end_in_text(path: pathlib.Path, tokenizer: Tokenizer, eos_token: str) -> None:
    around = ("{}", " {}", "{} ", "a{}b", "a {} b", "\n{}\n", "{}{}")
    texts = [form.replace("{}", token) for form in around for token in {eos_token, eos_token.strip("▁ ")}]
    for text in [*texts, eos_token.upper(), eos_token.lower(), _UNKNOWN]:
        ids = []
        with contextlib.suppress(DataError):  # it has no ids for the text
            ids = tokenizer.encode_unchecked(text)
        if tokenizer.eos_id in ids:
            raise DataError(
                f"tokenizer {path}: {eos_token!r} cannot end documents, since the text {text!r} holds it as well; mark "
                f'it as "special" among its added_tokens, or name another token with --eos_token'
            )
