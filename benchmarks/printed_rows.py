"""Rows of figures as processes print them for the program that started them: one JSON object a line."""

import json
from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]


def say(row: Row) -> None:
    """Prints a row."""
    print(json.dumps(row), flush=True)


def rows_in(text: str) -> Iterator[Row]:
    """The rows among what a process printed, which may have been cut short."""
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue  # the line under way when the process was ended
