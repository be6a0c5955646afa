"""The command line of `rat_jax.data.prepare`."""

import argparse
import re
from collections.abc import Sequence

from rat_jax.data.example_figures import ROW_KINDS
from rat_jax.data.workers import available_cpus
from rat_jax.program import ArgumentParser

DEFAULT_FIELD = "text"
PACKINGS = ("best_fit",)

_ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\\": "\\"}

_SOURCES = """\
sources (--source, --validation_source; one or several values, the flag once or several times):
  PATH                       a file, all files below a folder, or a glob pattern in quotes, each file by its ending:
                             .jsonl .ndjson JSON lines, .json the same or an array of objects, .parquet, others text
  text:PATH                  the same, all of it plain text
  jsonl:PATH  parquet:PATH   the same, but below a folder those of that kind only
  python-stdlib              the standard library of this Python (*.py, its tests left out)
  hf:NAME[:CONFIG[:SPLIT]]   a Hugging Face data set (needs the package `datasets`); text in the column --field
  recall:COUNT               generated documents of an associative recall task, for --tokenizer ids:46:0
  release-bin:FILE           flat uint16 token ids of the PyTorch release, used where they are; give the training file
                             as --source and the validation file as --validation_source
examples to learn answers from (--rows):
  Every record of JSON lines, Parquet or a data set is {"prompt": "...", "answer": "..."}, where the answer may be a
  list of texts, or {"messages": [...]} with the roles user and assistant, of which --chat_template makes a text. Rows
  of --seq_len tokens hold several examples that do not see each other (packed: fewer rows, for a run with
  data.segment_documents) or one (padded). Answers and their ends alone are learned. Too long a prompt loses its middle.
files:
  .gz, .bz2, .xz and .zst are unpacked. Text is UTF-8, or UTF-16 or UTF-32 with its byte order mark. Links are
  followed; hidden files are left out.
documents and splits:
  A document is a text file, or what lies between two --document_separator in it, or a record of the other kinds.
  Without --validation_source the hash of a document decides its split. If a split would have none, as with one single
  document, each document is cut, and its tail is for validation.
tokenizers (--tokenizer):
  bytes                      UTF-8 bytes and the end of a document: 257 ids
  bpe:SIZE                   a byte-level BPE of SIZE ids, trained on the training documents, for which words of more
                             than 1,000 characters are cut
  PATH                       a Hugging Face tokenizer.json, a SentencePiece .model (LLaMA-2: the RAT paper's recipe), or
                             the folder of a corpus that was prepared before
  ids:VOCAB_SIZE:EOS_ID      for release-bin without its tokenizer, and for text that is numbers: "12 7 931"

What is stopped leaves nothing behind, and starts from the beginning when the command is given again.
"""


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The values of all flags; None reads those of this process.

    Raises:
      FlagError: naming the flag.
    """
    parser = ArgumentParser(
        prog="python -m rat_jax.data.prepare",
        description="Turns text into token files.",
        epilog=_SOURCES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sources = {"action": "extend", "nargs": "+", "default": []}
    parser.add_argument("--source", **sources, help="where the text comes from, see below")
    parser.add_argument("--tokenizer", help="see below")
    parser.add_argument("--out", required=True, help="the folder to make")
    parser.add_argument("--validation_source", **sources, help="validation text of its own")
    parser.add_argument("--validation_fraction", type=float, default=0.05, help="of the documents (default 0.05)")
    parser.add_argument(
        "--field", default=DEFAULT_FIELD, help="key or column that holds the text, as text (default) or meta.text"
    )
    parser.add_argument(
        "--document_separator",
        type=_unescape,
        help=r"cut text files into documents here, as '\n\n'; else a file is one",
    )
    parser.add_argument("--rows", choices=ROW_KINDS, help="the sources hold examples, and rows hold them so, see below")
    parser.add_argument("--packing", choices=PACKINGS, help="put training documents into rows, whole where they fit")
    parser.add_argument(
        "--seq_len", type=int, help="tokens of a row of examples or packed documents: data.seq_len of the training"
    )
    parser.add_argument(
        "--chat_template",
        help="Jinja text, or a tokenizer_config.json that holds one; left out: the one in --tokenizer's folder",
    )
    parser.add_argument("--eos_token", help="the token that ends a document, if the tokenizer's file does not say it")
    parser.add_argument("--invalid_utf8", choices=("refuse", "replace"), default="refuse", help="(default refuse)")
    parser.add_argument("--num_workers", type=int, default=available_cpus(), help="processes (default one a core)")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus prepared with other settings")
    parser.add_argument("--verify", action="store_true", help="read the finished corpus again and compare its hashes")
    flags = parser.parse_args(arguments)
    for name in ("source", "tokenizer"):
        if not getattr(flags, name) and not flags.verify:
            parser.error(f"--{name} is missing")
    if flags.verify and bool(flags.source) != bool(flags.tokenizer):
        parser.error("--verify stands alone with --out, or beside all flags of a corpus to prepare")
    return flags


def _unescape(text: str) -> str:
    """The characters that a shell passes on as they are typed in quotes: `\\n`, `\\r`, `\\t` and `\\\\`."""

    def character(escape: re.Match[str]) -> str:
        if escape[0] not in _ESCAPES:
            raise argparse.ArgumentTypeError(f"{escape[0]!r} is none of \\n, \\r, \\t and \\\\ (a backslash)")
        return _ESCAPES[escape[0]]

    return re.sub(r"\\.?", character, text, flags=re.DOTALL)
