"""Writes a page of HTML that compares runs: losses, perplexities, tasks, speed, caches and configs.

  python -m rat_jax.report runs/rat runs/attention --out report.html

The page needs no network and no other file. Exit codes: 0; 2 if a WORKDIR is no run's or the page cannot be written,
and what was at --out is then as it was; 1 if the system refused a file otherwise.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from rat_jax import program
from rat_jax.files import system_errors, write_bytes
from rat_jax.paths import local_path
from rat_jax.report.page import GENERATOR, render
from rat_jax.report.run import ReportError, read_runs

_HEAD_BYTES = 1000  # of a page, among which the generator stands


def _is_there(out: pathlib.Path) -> bool:
    """Whether a page is there already, which a new one replaces.

    Raises:
      ReportError: if something else is there, or no folder that it could be in.
      FileError: if the system refuses to look.
    """
    with system_errors(out, "read"):
        if not out.parent.is_dir():
            raise ReportError(f"--out is {out}, and there is no folder {out.parent}: make it, or choose another place")
        if out.is_dir():
            raise ReportError(f"--out is {out}, which is a folder: name a file in it")
        if not out.exists():
            return False
        with out.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    if GENERATOR.encode() not in head:
        raise ReportError(f"{out} is there already and is no page of this program: choose another --out")
    return True


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = program.ArgumentParser(prog="python -m rat_jax.report", description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="of a run; the order is that of the page")
    parser.add_argument("--out", required=True, metavar="FILE", help="of HTML; an earlier page there is replaced")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the runs and writes the page; returns the exit code."""

    def body() -> None:
        parsed = _parse(arguments)
        out = local_path(parsed.out, "--out")
        replaces = _is_there(out)
        page = render(read_runs([local_path(path, "WORKDIR") for path in parsed.workdirs]))
        write_bytes(out, page)
        print(f"{out}: {len(parsed.workdirs)} run(s), {len(page):,} bytes{', in place of an earlier page' * replaces}")

    return program.exit_code(body)


if __name__ == "__main__":
    sys.exit(main())
