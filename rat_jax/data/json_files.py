"""JSON: lines of objects, and files that hold objects or one array of them."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator
from typing import BinaryIO

from rat_jax.data import DataError
from rat_jax.data.document import Document, FileReader, field_text
from rat_jax.data.utf8_file import BlockDecoder, decode, open_utf8

_BLOCK_CHARACTERS = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_AS_TEXT = "text:PATH reads any file as plain text"
_BYTE_ORDER_MARK = "\ufeff"  # at the start of a line, where files were put together


@dataclasses.dataclass(frozen=True)
class JsonLinesReader(FileReader):
    """One JSON object a line, with the text under one key."""

    kind = "JSON-lines file"

    def documents(self, path: pathlib.Path) -> Iterator[Document]:
        with open_utf8(path, self.options.invalid_utf8) as stream:
            for number, line in enumerate(stream, start=1):
                name = f"{path}, line {number}"
                text = decode(line, name, self.options.invalid_utf8).removeprefix(_BYTE_ORDER_MARK)
                if text.strip():
                    yield Document(name, field_text(_parse(text, name), name, self.options))


@dataclasses.dataclass(frozen=True)
class JsonReader(FileReader):
    """A `.json` file: JSON lines, objects over several lines, or an array of objects. None is in memory whole."""

    kind = "JSON file"

    def documents(self, path: pathlib.Path) -> Iterator[Document]:
        with open_utf8(path, self.options.invalid_utf8) as stream:
            for line, record in _values(_Characters(stream, path, self.options.invalid_utf8), str(path)):
                name = f"{path}, line {line}"
                if not isinstance(record, dict):
                    raise DataError(
                        f"{name} holds {_NAMES[type(record)]}; a .json file is read if it holds objects, or an array "
                        f"of objects, with the text under --field; {_AS_TEXT}"
                    )
                try:
                    text = field_text(record, name, self.options)
                except DataError as error:
                    raise DataError(f"{error}; {_AS_TEXT}") from None
                yield Document(name, text)


_NAMES = {
    list: "an array in an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


class _Characters:
    """The text of a stream from `position` on; what lies before is forgotten as more is read."""

    def __init__(self, stream: BinaryIO, path: pathlib.Path, invalid_utf8: str):
        self._stream = stream
        self._path = path
        self._decoder = BlockDecoder(invalid_utf8)
        self._at_end = False
        self.buffer, self.position, self.line = "", 0, 1

    def read_more(self) -> bool:
        """Doubles what there is from `position` on, so that a long value costs linear time; False at the end."""
        if self._at_end:
            return False
        kept = self.buffer[self.position :]
        block = self._stream.read(max(_BLOCK_CHARACTERS, len(kept)))
        self._at_end = not block
        name = f"{self._path}, after line {self.line},"
        self.buffer, self.position = kept + self._decoder.decode(block, name, final=self._at_end), 0
        return True

    def move_to(self, position: int) -> None:
        self.line += self.buffer.count("\n", self.position, position)
        self.position = position

    def next(self) -> str:
        """The next character that is no space, which is not passed; empty at the end."""
        while True:
            self.move_to(_SPACE.match(self.buffer, self.position).end())
            if self.position < len(self.buffer):
                return self.buffer[self.position]
            if not self.read_more():
                return ""


def _values(text: _Characters, name: str) -> Iterator[tuple[int, object]]:
    """The values that stand one after the other, or in one array, each with its line."""
    in_array = text.next() == "["
    if in_array:
        text.move_to(text.position + 1)
        if text.next() == "]":
            return
    while text.next():
        line = text.line
        yield line, _next_value(text, name)
        if in_array:
            end = text.next()
            if not end:
                break
            if end not in (",", "]"):
                raise DataError(f"{name}, line {text.line} is not JSON: an array goes on with a comma or ends with ]")
            text.move_to(text.position + 1)
            if end == "]":
                in_array = False
                if text.next():
                    raise DataError(f"{name}, line {text.line} is not JSON: text follows the end of the array")
    if in_array:
        raise DataError(f"{name} ends inside its array of objects: it was cut short")


def _next_value(text: _Characters, name: str) -> object:
    while True:
        try:
            value, end = json.JSONDecoder().raw_decode(text.buffer, text.position)
            text.move_to(end)
            return value
        except json.JSONDecodeError as error:
            # A value that goes on in what was not read yet fails at the end of what was, or at its last string.
            may_go_on = error.pos > len(text.buffer) - 16 or error.msg.startswith("Unterminated string")
            if not (may_go_on and text.read_more()):
                line = text.line + text.buffer.count("\n", text.position, error.pos)
                raise DataError(f"{name}, line {line} is not JSON: {error.msg}; {_AS_TEXT}") from None
        except (ValueError, RecursionError) as error:
            raise _unreadable(error, f"{name}, line {text.line}") from None


def _parse(text: str, name: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{name} is not JSON: {error.msg} (character {error.pos + 1})") from None
    except (ValueError, RecursionError) as error:
        raise _unreadable(error, name) from None


def _unreadable(error: ValueError | RecursionError, name: str) -> DataError:
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    return DataError(f"{name} is JSON that cannot be read: {reason}")
