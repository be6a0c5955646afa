"""The tokenizer that a `--tokenizer` argument names."""

import pathlib

from rat_jax.data import DataError
from rat_jax.data.tokenizer import INFO_FILE, ByteTokenizer, IdTokenizer, Tokenizer, check_bpe_size
from rat_jax.data.tokenizer_files import read_tokenizer
from rat_jax.paths import local_path

_EXPECTED = (
    "expected bytes, bpe:SIZE, ids:VOCAB_SIZE:EOS_ID, a tokenizer.json, a SentencePiece .model file or the folder of "
    "a prepared corpus"
)


def parse_tokenizer(spec: str, eos_token: str | None) -> Tokenizer | int:
    """A tokenizer, or the size of the BPE that is to be trained.

    Args:
      spec: the argument.
      eos_token: what ends a document, for tokenizers that are read from a file.

    Raises:
      DataError: if there is no such tokenizer, or it cannot be read.
    """
    if is_path(spec):
        return read_tokenizer(local_path(spec, "--tokenizer"), eos_token)
    kind, *numbers = spec.split(":")
    if kind not in ("bytes", "bpe", "ids"):
        raise DataError(f"--tokenizer {spec}: {_EXPECTED}")
    if not all(number.isdecimal() for number in numbers):
        raise DataError(f"--tokenizer {spec}: what stands after a colon must be a number")
    if eos_token is not None:
        raise DataError(f"--eos_token is for tokenizers that are read from a file; {spec} ends documents its own way")
    match kind, [int(number) for number in numbers]:
        case "bytes", []:
            return ByteTokenizer()
        case "bpe", [size]:
            check_bpe_size(size)
            return size
        case "ids", [vocab_size, eos_id]:
            return IdTokenizer(vocab_size, eos_id)
    raise DataError(f"--tokenizer {spec}: {_EXPECTED}")


def is_path(spec: str) -> bool:
    """Whether a tokenizer is read from a file or folder."""
    if spec.split(":")[0] in ("bytes", "bpe", "ids"):
        return False
    if spec.endswith((".json", ".model")) or spec.startswith(("/", "~", ".")) or "://" in spec:
        return True
    path = pathlib.Path(spec)
    return path.is_file() or (path / INFO_FILE).is_file()


def absolute_tokenizer(spec: str) -> str:
    """The same tokenizer by an absolute path, so that it means the same wherever a command is given."""
    return str(local_path(spec, "--tokenizer")) if is_path(spec) else spec
