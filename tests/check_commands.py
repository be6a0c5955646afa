"""Runs commands of the documentation up to the point where their work would begin; a program that test_docs.py starts.

Reads a JSON list of commands, each a list of words, and prints a JSON list with what is wrong with each, or null. The
scripts are run as they are, with two functions replaced: parsing arguments is their end where `argparse` does it, and
training or loading a model where `absl` does. So imports, flags, their types, config files and overrides are the real
ones, and nothing is computed or written.
"""

import argparse
import contextlib
import io
import json
import pathlib
import re
import runpy
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402
from packaging.requirements import InvalidRequirement, Requirement  # noqa: E402

import rat_jax.checkpoints  # noqa: E402
import rat_jax.training  # noqa: E402
import rat_jax.training.dry_run  # noqa: E402
from rat_jax.cluster import launch  # noqa: E402

_FOLDERS = ("benchmarks/", "configs/", "docs/", "pallas_kernels/", "rat_jax/", "tests/")


class _WorkBeginsError(Exception):
    """The arguments are good."""


def _begin(*arguments, **settings):
    raise _WorkBeginsError


def _parse_and_begin(parser, *arguments, **settings):
    _PARSE(parser, *arguments, **settings)
    raise _WorkBeginsError


_PARSE = argparse.ArgumentParser.parse_args
argparse.ArgumentParser.parse_args = _parse_and_begin
rat_jax.training.train = _begin
rat_jax.training.dry_run.dry_run = _begin
rat_jax.checkpoints.load_model = _begin
launch.detected_place = lambda secs: None
launch._join = lambda *arguments: None
app.define_help_flags()  # once, before the flags of any script


def _python(words: list[str]) -> str | None:
    """What is wrong with a command of Python."""
    is_module, words = words[0] == "-m", words[1:] if words[0] == "-m" else words
    if is_module and words[0] == "pytest":
        return _pytest(words[1:])
    if not is_module and not (ROOT / words[0]).is_file():
        return f"there is no file {words[0]}"
    sys.argv = words
    known = set(flags.FLAGS)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            if is_module:
                runpy.run_module(words[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except _WorkBeginsError:
        return None
    except SystemExit as end:
        return None if end.code in (0, None) else f"exit code {end.code}: {said.getvalue()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for name in set(flags.FLAGS) - known:  # the next script defines its own
            delattr(flags.FLAGS, name)
    return "it ended before its arguments were read"


def _pip(words: list[str]) -> str | None:
    """What is wrong with a command of pip."""
    if words[0] != "install":
        return f"pip {words[0]} is not known to this test"
    rest = iter(words[1:])
    for word in rest:
        if word in ("-r", "-c"):
            file = next(rest)
            if not (ROOT / file).is_file():
                return f"there is no file {file}"
        elif word != ".":
            try:
                Requirement(word)
            except InvalidRequirement as error:
                return str(error)
    return None


def _make(words: list[str]) -> str | None:
    """What is wrong with a command of make."""
    done = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    return None if done.returncode == 0 else done.stderr


def _pytest(words: list[str]) -> str | None:
    """What is wrong with a command of pytest."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    markers = {marker.split(":")[0] for marker in settings["markers"]}
    named = [words[i + 1] for i, word in enumerate(words) if word == "-m"]
    used = set(re.findall(r"\w+", " ".join(named))) - {"not", "and", "or"}
    return None if used <= markers else f"no marker is called {', '.join(sorted(used - markers))}"


def problem(command: list[str]) -> str | None:
    """What is wrong with a command; None if it would begin its work."""
    program, *words = command
    for word in words:
        path = word.partition("=")[2] if word.startswith("--") else word
        if path.startswith(_FOLDERS) and not any(ROOT.glob(path.split(":")[0])):
            return f"there is no {path}"
    return {"python": _python, "pip": _pip, "make": _make, "pytest": _pytest}[program](words)


if __name__ == "__main__":
    answers = [problem(command) for command in json.load(sys.stdin)]
    print(json.dumps(answers))
