"""What the documentation tells a reader to run: its Python blocks and its commands, as the shell would run them."""

import os
import pathlib
import re
import subprocess
import sys
import tempfile

from tests.commands import import_path

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "rivals.md",
]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE_COMMAND = re.compile(r"`((?:python|pip|make|pytest)\s[^`]*)`")
# Programs become functions that write down their arguments, so that variables, loops and quotes are the shell's own;
# with an empty PATH any other program is an error. `python -c` is short and runs, since its output may be a command's.
_RECORD = r"""
set -euo pipefail
PATH=/nonexistent
record() { printf '%s\0' "$#" "$@" >> "$COMMANDS"; }
for name in pip make pytest; do eval "$name() { record $name \"\$@\"; }"; done
python() { if [ "$1" = -c ]; then "$PYTHON" "$@" || record failed "$@"; else record python "$@"; fi; }
python3() { python "$@"; }
cd() { :; }
gcloud() { for word; do case "$word" in --command=*) eval "${word#--command=}";; esac; done; }
srun() { while [ "$1" != python ]; do shift; done; record "$@"; }
"""


def blocks(page: pathlib.Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return [text for name, text in _FENCE.findall(page.read_text()) if name == language]


def languages(page: pathlib.Path) -> set[str]:
    """The languages of all fenced blocks, "" where one has none."""
    return {name for name, _ in _FENCE.findall(page.read_text())}


def without_blocks(page: pathlib.Path) -> str:
    """The text around the fenced blocks."""
    return _FENCE.sub("", page.read_text())


def commands(page: pathlib.Path) -> list[list[str]]:
    """Every command of the sh blocks and of inline code, as the list of its words.

    Raises:
      ValueError: if the shell cannot run a block, or it calls a program that no test knows.
    """
    inline = [" ".join(text.split()) for text in _INLINE_COMMAND.findall(without_blocks(page))]
    return [command for script in [*blocks(page, "sh"), *inline] for command in shell_commands(script)]


def shell_commands(script: str) -> list[list[str]]:
    """The commands that a script would run.

    Raises:
      ValueError: if the shell cannot run it, or it calls a program that no test knows.
    """
    with tempfile.TemporaryDirectory() as folder:
        record = pathlib.Path(folder) / "commands"
        record.touch()
        done = subprocess.run(
            ["bash", "-c", _RECORD + script],
            cwd=folder,
            env=os.environ | {"COMMANDS": str(record), "PYTHON": sys.executable, "PYTHONPATH": import_path()},
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise ValueError(f"{script}\n{done.stderr}")
        words = record.read_text().split("\0")[:-1]
    found = []
    while words:
        count = int(words.pop(0))
        found.append(words[:count])
        del words[:count]
    if any(command[0] == "failed" for command in found):
        raise ValueError(f"{script}\n{done.stderr}")
    return found
