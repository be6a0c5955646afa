"""Documents of files: what is text of pages, of sources and of a dictionary."""

import re
from collections.abc import Callable, Iterator

import lxml.etree
import lxml.html
from inscriptis import get_text

from benchmarks.evidence.packages import Kind

_BESIDE_TEXT = (  # of pages: what leads elsewhere
    "//script | //style | //nav | //header | //footer | //form | //noscript | //*[contains(@class, 'nav')] | "
    "//*[contains(@class, 'menu')] | //*[contains(@class, 'docnav')] | //*[contains(@class, 'nosearch')]"
)
_REPLACED, _MOST_REPLACED = "\ufffd", 1e-4  # of all characters; the dictionary has three bytes of another encoding
_ENTRY = re.compile(r"\n\n(?=\S)")  # an entry's first line alone is not indented
_ENTRIES_CHARACTERS = 4_000  # of a document, at least: most entries are a few lines


def documents(kind: Kind, data: bytes, content: str | None) -> Iterator[str]:
    """The documents of a file; none where it is not UTF-8 but for stray bytes.

    Args:
      kind: of the file.
      data: of the file.
      content: of a page, as `Package` has it.
    """
    text = data.decode("utf-8", "replace")
    if text.count(_REPLACED) > len(text) * _MOST_REPLACED:
        return
    for document in READERS[kind](text, content):
        if tidy := _tidy(document):
            yield tidy


def _whole(text: str, _: str | None) -> list[str]:
    return [text]


def _page(text: str, content: str | None) -> list[str]:
    try:
        page = lxml.html.document_fromstring(text.encode())
    except lxml.etree.ParserError:  # nothing in it
        return []
    for element in page.xpath(_BESIDE_TEXT):
        if element.getparent() is not None and element.tag not in ("body", "main"):
            element.drop_tree()
    parts = page.xpath(content or "//body")
    return [get_text(lxml.html.tostring(part, encoding="unicode")) for part in parts[:1]]


def _entries(text: str, _: str | None) -> Iterator[str]:
    """Entries in the order of the alphabet, so many that they make a document."""
    entries, characters = [], 0
    for entry in _ENTRY.split(text):
        entries.append(entry)
        characters += len(entry)
        if characters >= _ENTRIES_CHARACTERS:
            yield "\n\n".join(entries)
            entries, characters = [], 0
    if entries:
        yield "\n\n".join(entries)


READERS: dict[Kind, Callable[[str, str | None], list[str] | Iterator[str]]] = {
    "markup": _whole,
    "python": _whole,
    "page": _page,
    "dictionary": _entries,
}


def _tidy(text: str) -> str:
    """Without spaces at the ends of lines, and with two empty lines in a row at most."""
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return re.sub(r"\n{4,}", "\n\n\n", lines).strip()
