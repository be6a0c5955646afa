"""The records of a split, whatever it holds."""

from rat_jax.data import DataError
from rat_jax.data.corpus import Corpus, Split
from rat_jax.data.example_rows import ExampleRows
from rat_jax.data.token_file import TokenFile
from rat_jax.data.windows import Windows
from rat_jax.data_config import DataConfig

Records = Windows | ExampleRows


def open_records(corpus: Corpus, split: Split, config: DataConfig, vocab_size: int) -> Records:
    """The records of a corpus's split.

    Raises:
      DataError: if they are damaged, of another vocabulary than the model's, or do not fit the config.
    """
    file = check_vocabulary(corpus, split, vocab_size)
    if file.header.row_tokens is not None:
        return ExampleRows.open(corpus, split, config)
    packed = file.header.packed_row_tokens
    if packed not in (None, config.seq_len):
        raise DataError(
            f"{corpus.path} holds rows of {packed} tokens, and data.seq_len is {config.seq_len}: set it to {packed} "
            f"or prepare the data with --seq_len {config.seq_len}"
        )
    return Windows(file, config.seq_len, config.segment_documents, config.first_target_id)


def check_vocabulary(corpus: Corpus, split: Split, vocab_size: int) -> TokenFile:
    """The token file of a split; errors as of `open_records`."""
    file = corpus.token_file(split)
    if file.header.vocab_size != vocab_size:
        raise DataError(
            f"{file.path} has a vocabulary of {file.header.vocab_size}, but the model's is {vocab_size}: set "
            f"model.vocab_size to {file.header.vocab_size}, or data.path to files of that vocabulary"
        )
    return file
