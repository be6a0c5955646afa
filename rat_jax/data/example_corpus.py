"""The token files of a corpus of examples."""

import contextlib
import pathlib
import tempfile

import tqdm

from rat_jax.data import DataError
from rat_jax.data.chat_template import ChatTemplate
from rat_jax.data.corpus import SPLITS, Split
from rat_jax.data.encoding import encode
from rat_jax.data.example_collection import ExampleCollection
from rat_jax.data.example_encoding import ExampleEncoder, ExampleSpool
from rat_jax.data.example_figures import Examples, RowFigures, RowKind
from rat_jax.data.packing import best_fit
from rat_jax.data.token_file import Header, TokenFileWriter
from rat_jax.data.tokenizer import Tokenizer
from rat_jax.files import system_errors

_RECIPE_BATCH = 128  # sequences of a step, of arXiv 2507.04416


def write_examples(
    collection: ExampleCollection,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    *,
    rows: RowKind,
    seq_len: int,
    folder: pathlib.Path,
    num_workers: int,
) -> tuple[dict[Split, Header], Examples]:
    """Encodes all examples, puts them into rows and writes both splits.

    Args:
      collection: settled.
      tokenizer: of the ids.
      template: that made texts of the chats, saved beside the tokenizer.
      rows: several examples a row by best fit, or one and padding.
      seq_len: tokens of a row.
      folder: that is made.
      num_workers: processes that encode; 0 encodes in this one.

    Raises:
      DataError: if the tokenizer refuses a text, or all answers of a split are too long.
      FileError: if the system refuses.
    """
    if template is not None:
        template.save(folder)
    headers, figures = {}, {}
    with contextlib.ExitStack() as stack:
        spools = {}
        for split in SPLITS:
            with system_errors(folder, "written"):
                file = stack.enter_context(tempfile.TemporaryFile(dir=folder))
            spools[split] = ExampleSpool(file, folder, tokenizer)
        with tqdm.tqdm(unit="record", desc="encoding", total=collection.num_documents) as bar:
            encoder = ExampleEncoder(tokenizer, seq_len)
            for part in encode(collection.documents(), encoder, num_workers=num_workers):
                spools[part.split].append(part)
                bar.update(part.num_records)
        for split, spool in spools.items():
            headers[split], figures[split] = _write(spool, split, tokenizer, rows, seq_len, folder)
    return headers, Examples(seq_len, rows, None if template is None else template.hash, figures)


def _write(
    spool: ExampleSpool, split: Split, tokenizer: Tokenizer, rows: RowKind, seq_len: int, folder: pathlib.Path
) -> tuple[Header, RowFigures]:
    if not spool.lengths:
        raise DataError(
            f"no examples in the {split} split: all {spool.num_left_out:,} answers of it need more than --seq_len "
            f"{seq_len} tokens with one of a prompt; raise it"
        )
    lengths = spool.lengths
    members = best_fit(lengths, seq_len) if rows == "packed" else [[index] for index in range(len(lengths))]
    with TokenFileWriter(folder / f"{split}.bin", tokenizer, row_tokens=seq_len) as writer:
        for examples in tqdm.tqdm(spool.read(members), unit="row", desc=f"writing {split}", total=len(members)):
            writer.append_row(examples)
        header = writer.close()
    figures = RowFigures(
        num_rows=len(members),
        num_examples=len(lengths),
        num_tokens=sum(lengths),
        num_answer_tokens=spool.num_answer_tokens,
        num_cut=spool.num_cut,
        num_left_out=spool.num_left_out,
    )
    return header, figures


def describe(examples: Examples) -> list[str]:
    """The counts of each split in a line, and the number of steps of an epoch."""
    lines = []
    for split, figures in examples.splits.items():
        lines.append(
            f"{split:<10} {figures.num_examples:>9,} examples in {figures.num_rows:,} {examples.rows} rows of "
            f"{examples.seq_len:,}: {figures.efficiency(examples.seq_len):.1%} of their tokens are examples, "
            f"{figures.num_answer_tokens / figures.num_tokens:.1%} of these answers; {figures.num_cut:,} prompts cut "
            f"in the middle, {figures.num_left_out:,} answers too long and left out"
        )
    lines.append(
        f"one epoch is config.training.num_steps={examples.num_steps(_RECIPE_BATCH)} at "
        f"config.data.global_batch_size={_RECIPE_BATCH}: training rows / sequences of a batch, rounded up"
    )
    return lines
