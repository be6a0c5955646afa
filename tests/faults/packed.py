"""Faults in documents that are packed into rows, and in what says how long their rows are."""

import dataclasses
import hashlib
import json
import pathlib
import shutil

from rat_jax.data.json_object import checksum
from rat_jax.data.token_file import TokenFile
from tests.data.format_1 import rewrite_corpus, rewrite_token_file
from tests.faults.base import ROW_TOKENS, Base
from tests.faults.damage import HEADER_BYTES, Case, damaged_header, kind, rewrite
from tests.faults.mutations import mutate_bytes, mutate_json_text


@kind(12, "refused", reads="packed")
def bytes_of_packed_rows_changed(case: Case) -> str:
    """Also of the digests behind them."""
    path = case.corpus / "train.bin"
    return rewrite(path, lambda content: content[:HEADER_BYTES] + mutate_bytes(content[HEADER_BYTES:], case.rng))


@kind(4, "refused", reads="packed")
def packed_rows_in_another_order(case: Case) -> str:
    """Rows change places, or one takes another's: every row is still one of whole documents."""
    path, row = case.corpus / "train.bin", 2 * ROW_TOKENS
    content = bytearray(path.read_bytes())
    num_rows = TokenFile.open(path).header.num_bytes // row
    rows = [content[HEADER_BYTES + i * row : HEADER_BYTES + (i + 1) * row] for i in range(num_rows)]
    while True:
        a, b = case.rng.sample(range(num_rows), 2)
        if rows[a] != rows[b]:
            break
    swapped = case.rng.random() < 0.5
    content[HEADER_BYTES + a * row : HEADER_BYTES + (a + 1) * row] = rows[b]
    if swapped:
        content[HEADER_BYTES + b * row : HEADER_BYTES + (b + 1) * row] = rows[a]
    path.write_bytes(content)
    return f"rows {a} and {b}" if swapped else f"row {a} is row {b}"


@kind(8, "refused", reads="packed")
def bytes_of_the_header_of_packed_rows_changed(case: Case) -> str:
    return rewrite(case.corpus / "train.bin", lambda content: damaged_header(content, case.rng))


@kind(12, reads="packed")
def metadata_of_packed_rows_changed(case: Case) -> str:
    return rewrite(case.corpus / "metadata.json", lambda content: mutate_json_text(content, case.rng))


@kind(12, reads="packed")
def numbers_in_the_header_of_packed_rows_changed_with_their_checksums(case: Case) -> str:
    """As another program would write them, or an older version, which knew no rows."""
    header = TokenFile.open(case.corpus / "train.bin").header
    name, value = case.rng.choice(
        [
            *[
                ("packed_row_tokens", tokens)
                for tokens in (None, 2, ROW_TOKENS // 2, 2 * ROW_TOKENS, header.num_tokens)
            ],
            *[("row_tokens", tokens) for tokens in (ROW_TOKENS, 2)],
            *[("num_tokens", header.num_tokens + change) for change in (-ROW_TOKENS, -1, 1, ROW_TOKENS)],
            *[("num_documents", header.num_documents + change) for change in (-1, 1)],
            *[("eos_id", 1), ("vocab_size", 30), ("content_hash", "0" * 64), ("digests_hash", "0" * 64)],
        ]
    )
    _seal(case.corpus, dataclasses.replace(header, **{name: value}).to_bytes())
    return f"{name} was {getattr(header, name)}, is {value}"


@kind(4, reads="packed")
def numbers_in_the_metadata_of_packed_rows_changed_with_their_checksum(case: Case) -> str:
    def change(values: dict) -> str:
        number = case.rng.choice(["num_documents", "num_tokens", "num_padding"])
        by = case.rng.choice([-1, 1, ROW_TOKENS])
        for figures in (values["splits"]["train"], values["total"]):
            figures[number] += by
        return f"{number} by {by}"

    return _change_metadata(case.corpus, change)


@kind(2, reads="packed")
def packed_rows_in_the_older_format(case: Case) -> str:
    """Which knew none."""
    if case.rng.random() < 0.5:
        rewrite_token_file(case.corpus / "train.bin")
        return "train.bin"
    rewrite_corpus(case.corpus)
    return "all"


@kind(4, "refused", reads="packed")
def packed_rows_prepared_again_otherwise(case: Case) -> str:
    """Not packed, in rows of another length, from other documents."""
    changes = case.rng.choice(
        [{"packing": None, "seq_len": None}, {"seq_len": 2 * ROW_TOKENS}, {"num_ids": 1200}, {"line_ids": 11}]
    )
    shutil.rmtree(case.data)
    Base(case.data.parent, "packed").prepare(case.data, **changes)
    return f"{changes}"


@kind(2, "continued", reads="packed")
def packed_rows_prepared_again_from_the_same_documents(case: Case) -> str:
    shutil.rmtree(case.data)
    Base(case.data.parent, "packed").prepare(case.data)
    return "all"


@kind(4, "refused", reads="packed")
def what_a_config_says_of_packed_rows_changed(case: Case) -> str:
    name, value = case.rng.choice(
        [
            ("seq_len", ROW_TOKENS // 2),
            ("seq_len", 2 * ROW_TOKENS),
            ("segment_documents", False),
            ("first_target_id", 9),
        ]
    )
    case.config["data"][name] = value
    return f"{name} to {value}"


def _seal(corpus: pathlib.Path, header: bytes) -> None:
    """Gives the training split a header that the metadata name as its own."""
    rewrite(corpus / "train.bin", lambda content: header + content[HEADER_BYTES:])

    def change(values: dict) -> str:
        values["header_hashes"]["train"] = hashlib.sha256(header).hexdigest()
        return ""

    _change_metadata(corpus, change)


def _change_metadata(corpus: pathlib.Path, change) -> str:
    path = corpus / "metadata.json"
    values = json.loads(path.read_text())
    done = change(values)
    version = {"format_version": values.pop("format_version")}
    del values["checksum"]
    path.write_text(json.dumps(version | values | {"checksum": checksum(values)}))
    return done
