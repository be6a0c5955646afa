"""Corpora as the first format had them: no checksums, no digests of blocks, no hashes of headers."""

import dataclasses
import json
import pathlib

from rat_jax.data.corpus import SPLITS
from rat_jax.data.token_file import TokenFile
from rat_jax.data.token_header import HEADER_BYTES, MAGIC

ADDED_FIELDS = ("name", "block_bytes", "digests_hash")


def rewrite_token_file(path: pathlib.Path) -> None:
    header = TokenFile.open(path).header
    fields = {name: value for name, value in dataclasses.asdict(header).items() if name not in ADDED_FIELDS}
    ids = path.read_bytes()[HEADER_BYTES : HEADER_BYTES + header.num_bytes] if header.data_file is None else b""
    content = MAGIC + (1).to_bytes(4, "little") + json.dumps(fields).encode()
    path.write_bytes(content.ljust(HEADER_BYTES) + ids)


def rewrite_corpus(path: pathlib.Path) -> None:
    for split in SPLITS:
        rewrite_token_file(path / f"{split}.bin")
    values = json.loads((path / "metadata.json").read_text())
    values["format_version"] = 1
    del values["checksum"], values["header_hashes"]
    (path / "metadata.json").write_text(json.dumps(values, indent=2) + "\n")
