"""Gathers the text of the studies from packages whose versions are recorded, without doubles.

  python -m benchmarks.evidence.gather --out data/evidence
  python -m rat_jax.data.prepare --source data/evidence/documents.jsonl.xz --tokenizer bpe:32000 \
      --validation_fraction 0.03 --out data/evidence/corpus

Writes OUT/documents.jsonl.xz, a document a line as {"text": ..., "package": ...}, and OUT/gathered.json, what is in it;
prints the table of docs/evidence.md. Packages are kept in OUT/downloads. With --small the text is a few files of
packages that are installed here, and nothing is downloaded.
"""

import argparse
import dataclasses
import fnmatch
import hashlib
import importlib.metadata
import json
import lzma
import pathlib
import sys
from collections.abc import Iterator, Sequence

import tqdm

from benchmarks.evidence.archives import members
from benchmarks.evidence.doubles import Novelty, Seen
from benchmarks.evidence.downloads import DEBIAN_MIRROR, download
from benchmarks.evidence.packages import PACKAGES, Package
from benchmarks.evidence.texts import documents
from rat_jax import program
from rat_jax.files import write_json
from rat_jax.paths import local_path

LEAST_CHARACTERS = 200  # of a document
SMALL = ("flax", "optax")  # packages of --small: the project needs them
_SMALL_CHARACTERS = 400_000


@dataclasses.dataclass
class Share:
    """What a package gives."""

    package: str
    version: str
    licence: str
    documents: int = 0
    characters: int = 0
    short: int = 0  # documents that are left out
    doubles: int = 0
    near_doubles: int = 0

    def count(self, text: str, novelty: Novelty) -> None:
        """Counts a document that is long enough."""
        self.doubles += novelty is Novelty.DOUBLE
        self.near_doubles += novelty is Novelty.NEAR_DOUBLE
        if novelty is Novelty.NEW:
            self.documents += 1
            self.characters += len(text)


def texts_of(package: Package, files: Iterator[tuple[str, bytes]]) -> list[str]:
    """The documents of a package's files; of too many those whose digests come first, in the order of the files."""
    texts = [
        text
        for path, data in files
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in package.members)
        and not any(fnmatch.fnmatchcase(path, pattern) for pattern in package.without)
        for text in documents(package.kind, data, package.content)
    ]
    if package.most_characters is None:
        return texts
    taken, characters = set(), 0
    for index in sorted(range(len(texts)), key=lambda i: hashlib.blake2b(texts[i].encode()).digest()):
        characters += len(texts[index])
        if characters > package.most_characters:
            break
        taken.add(index)
    return [text for index, text in enumerate(texts) if index in taken]


def gather(packages: Iterator[tuple[Package, list[str]]], file: pathlib.Path) -> tuple[list[Share], str]:
    """Writes the documents of all packages as lines; returns what each gives, and the digest of the lines."""
    seen, shares, digest = Seen(), [], hashlib.sha256()
    with lzma.open(file, "wb", preset=9) as lines:
        for package, texts in packages:
            share = Share(package.name, package.version, package.licence)
            shares.append(share)
            for text in texts:
                if len(text) < LEAST_CHARACTERS:
                    share.short += 1
                    continue
                novelty = seen.add(text)
                share.count(text, novelty)
                if novelty is Novelty.NEW:
                    line = json.dumps({"text": text, "package": package.name}, ensure_ascii=False).encode() + b"\n"
                    digest.update(line)
                    lines.write(line)
    return shares, digest.hexdigest()


def table(shares: Sequence[Share]) -> str:
    """What each package gives, as Markdown."""
    total = sum(share.characters for share in shares)
    lines = ["| package | version | licence | documents | characters | share | near doubles left out |"]
    lines.append("|---|---|---|--:|--:|--:|--:|")
    for share in shares:
        part = share.characters / max(1, total)
        lines.append(
            f"| {share.package} | {share.version} | {share.licence} | {share.documents:,} | {share.characters:,} "
            f"| {100 * part:.1f} % | {share.doubles + share.near_doubles:,} |"
        )
    return "\n".join(lines)


def _downloaded(folder: pathlib.Path, mirror: str) -> Iterator[tuple[Package, list[str]]]:
    for package in tqdm.tqdm(PACKAGES, unit="package", disable=not sys.stderr.isatty()):
        yield package, texts_of(package, members(download(package, folder, mirror)))


def _installed() -> Iterator[tuple[Package, list[str]]]:
    """A few sources of packages that are installed here."""
    for name in SMALL:
        found = importlib.metadata.distribution(name)
        licence = found.metadata.get("License-Expression") or found.metadata.get("License") or "its own"
        settings = {"kind": "python", "members": ("*.py",), "most_characters": _SMALL_CHARACTERS}
        package = Package(name, found.version, "", "", licence.splitlines()[0][:40], **settings)
        paths = sorted(path for path in found.files if path.suffix == ".py")
        yield package, texts_of(package, ((str(path), path.read_binary()) for path in paths))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = program.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the text")
    parser.add_argument("--debian_mirror", default=DEBIAN_MIRROR, help=f"(default {DEBIAN_MIRROR})")
    parser.add_argument("--small", action="store_true", help="a little text of installed packages, without downloads")
    return parser.parse_args(arguments)


def _gather(flags: argparse.Namespace) -> None:
    out = local_path(flags.out, "--out")
    out.mkdir(parents=True, exist_ok=True)
    file, unfinished = out / "documents.jsonl.xz", out / "documents.part"
    packages = _installed() if flags.small else _downloaded(out / "downloads", flags.debian_mirror)
    shares, digest = gather(packages, unfinished)
    unfinished.rename(file)
    values = {"sha256_of_lines": digest, "compressed_bytes": file.stat().st_size}
    write_json(out / "gathered.json", values | {"packages": [dataclasses.asdict(share) for share in shares]})
    print(table(shares))
    documents, characters = (sum(getattr(share, name) for share in shares) for name in ("documents", "characters"))
    print(
        f"\n{documents:,} documents, {characters:,} characters; {file} is {file.stat().st_size / 2**20:.1f} MiB; "
        f"sha256 of its lines {digest}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Gathers; returns the exit code."""
    return program.exit_code(lambda: _gather(_parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
