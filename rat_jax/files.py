"""Files that are either complete or as they were, however the process that writes them ends."""

import json
import os
import pathlib
from typing import Any


def write_json(path: pathlib.Path, values: Any) -> None:
    """Writes a file of JSON."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
