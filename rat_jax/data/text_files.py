"""Plain text: a document a file, or several with a separator between them."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator

from rat_jax.data.document import Document, FileReader
from rat_jax.data.utf8_file import BlockDecoder, decode, open_utf8

_BLOCK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class TextReader(FileReader):
    """Text files; where the separator has a line end, the text may have that of Windows (`\\r\\n`)."""

    kind = "text file"

    def check(self, path: pathlib.Path) -> None:
        with open_utf8(path, self.options.invalid_utf8) as stream:
            stream.read(1)  # a document may be as long as the file

    def num_documents(self, path: pathlib.Path) -> int | None:
        return 1 if self.options.document_separator is None else None

    def documents(self, path: pathlib.Path) -> Iterator[Document]:
        if self.options.document_separator is None:
            with open_utf8(path, self.options.invalid_utf8) as stream:
                text = decode(stream.read(), str(path), self.options.invalid_utf8)
            yield Document(str(path), text)
        else:
            yield from self._separated(path, self.options.document_separator)

    def _separated(self, path: pathlib.Path, separator: str) -> Iterator[Document]:
        pattern = re.compile(re.sub(r"(?<!\r)\n", r"\\r?\\n", re.escape(separator).replace("\\\n", "\n")))
        overlap = len(separator) + separator.count("\n") - 1  # characters that may begin a separator that goes on
        decoder = BlockDecoder(self.options.invalid_utf8)
        number = 0
        parts, rest = [], ""  # the document so far: parts, in which no separator begins, then rest
        with open_utf8(path, self.options.invalid_utf8) as stream:
            at_end = False
            while not at_end:
                block = stream.read(_BLOCK_BYTES)
                at_end = not block
                rest += decoder.decode(block, f"{path}, after document {number},", final=at_end)
                searched = 0
                for match in pattern.finditer(rest):
                    number += 1
                    yield Document(
                        f"{path}, document {number}", "".join([*parts, rest[searched : match.start()]]), True
                    )
                    parts, searched = [], match.end()
                settled = max(searched, len(rest) - overlap)
                parts.append(rest[searched:settled])
                rest = rest[settled:]
        yield Document(f"{path}, document {number + 1}", "".join([*parts, rest]), separated=number > 0)
