"""Files inside of Debian packages and of wheels."""

import gzip
import io
import pathlib
import tarfile
import zipfile
from collections.abc import Iterator

_MAGIC, _HEADER_BYTES = b"!<arch>\n", 60


def members(archive: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Path and content of each file inside a `.deb` or a `.whl`, sorted by path; gzip is unpacked, links are left out.

    Raises:
      ValueError: if it is no such archive.
    """
    found = _of_wheel(archive) if archive.suffix == ".whl" else _of_deb(archive)
    for path, data in sorted(found):
        yield path, gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data


def _of_wheel(archive: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(archive) as wheel:
        for name in wheel.namelist():
            if not name.endswith("/"):
                yield name, wheel.read(name)


def _of_deb(archive: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(_data_of_deb(archive))) as data:
        for entry in data:
            if entry.isfile():
                yield entry.name.removeprefix("./"), data.extractfile(entry).read()


def _data_of_deb(archive: pathlib.Path) -> bytes:
    """The archive of a package's files, in an archive of the format of Unix's `ar` (deb(5))."""
    content = archive.read_bytes()
    if not content.startswith(_MAGIC):
        raise ValueError(f"{archive} is no Debian package")
    place = len(_MAGIC)
    while place < len(content):
        header = content[place : place + _HEADER_BYTES]
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        place += _HEADER_BYTES
        if name.startswith("data.tar"):
            return content[place : place + size]
        place += size + size % 2  # entries begin at even places
    raise ValueError(f"{archive} is a Debian package without files")
