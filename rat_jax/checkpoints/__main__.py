"""Checkpoints of a workdir, and weights for others: looked at, compared, written and read without PyTorch.

  python -m rat_jax.checkpoints list WORKDIR
  python -m rat_jax.checkpoints verify WORKDIR
  python -m rat_jax.checkpoints export WORKDIR FOLDER --dtype=bfloat16
  python -m rat_jax.checkpoints import FOLDER WORKDIR

`export` writes the newest good checkpoint's model (or that of `--step`) as a folder of safetensors files
(`rat_jax.checkpoints.weights`); `import` makes a workdir of such a folder, which eval.py and generate.py work with and
from which train.py starts. `list` and `verify` take such folders, too: `list` compares sizes, `verify` reads all files
and compares their contents. Exit codes: 0; 2 if flags, workdir or files do not fit or are damaged, and nothing was
changed; 1 if the system refused a file when another was written already.
"""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rat_jax import program
from rat_jax.checkpoints.folder import aside, step_folders
from rat_jax.checkpoints.manifest import Manifest
from rat_jax.checkpoints.model_workdir import require_unused, save_model
from rat_jax.checkpoints.store import load_model
from rat_jax.checkpoints.weights import Weights, check_new, is_weights, write_weights
from rat_jax.checkpoints.workdir import CheckpointError, Workdir
from rat_jax.data import DataError
from rat_jax.data.chat_template import load_chat_template
from rat_jax.data.tokenizer import load_tokenizer
from rat_jax.errors import RunStopped
from rat_jax.files import FileError, system_errors
from rat_jax.paths import local_path


class _Finding(NamedTuple):
    """What was found of a checkpoint or of a folder of weights."""

    name: str
    num_bytes: int
    holds: str
    state: str
    is_bad: bool


def _export(arguments: argparse.Namespace) -> None:
    workdir, folder = Workdir(local_path(arguments.workdir, "WORKDIR")), local_path(arguments.folder, "FOLDER")
    check_new(folder)
    loaded = load_model(workdir.path, arguments.step, report=_say)
    tokenizer = load_tokenizer(workdir.tokenizer) if workdir.tokenizer.exists() else None
    template = load_chat_template(workdir.tokenizer)
    try:
        write_weights(folder, loaded.config, loaded.model, loaded.step, tokenizer, template, dtype=arguments.dtype)
    except FileError as error:
        raise RunStopped(f"{error}; nothing is left of {folder}") from None
    hint = "" if tokenizer else "\nthe workdir has no tokenizer, and so the folder has none"
    print(f"{folder}: {loaded.path}, step {loaded.step}, {arguments.dtype}{hint}")


def _import(arguments: argparse.Namespace) -> None:
    folder, workdir = local_path(arguments.folder, "FOLDER"), local_path(arguments.workdir, "WORKDIR")
    require_unused(Workdir(workdir))
    weights = Weights.open(folder)
    tokenizer = weights.load_tokenizer()
    save_model(workdir, weights.config, weights.model(), weights.step, tokenizer, weights.load_chat_template())
    hint = "" if tokenizer else "\nthe folder has no tokenizer, and so the workdir has none"
    print(f"{workdir}: {', '.join(weights.config.model.pattern)}, step {weights.step}{hint}")


def _list(arguments: argparse.Namespace) -> None:
    for finding in _look(local_path(arguments.path, "PATH"), contents=False):
        _print(finding)


def _verify(arguments: argparse.Namespace) -> None:
    path, findings = local_path(arguments.path, "PATH"), []
    for finding in _look(path, contents=True):
        findings.append(finding)
        _print(finding)
    if bad := [finding.name for finding in findings if finding.is_bad]:
        raise CheckpointError(f"{path}: {', '.join(bad)} cannot be used")


def _look(path: pathlib.Path, *, contents: bool) -> Iterator[_Finding]:
    """What is in a workdir, newest first, or in a folder of weights.

    Raises:
      CheckpointError: if there is none, or it holds nothing.
    """
    if is_weights(path):
        yield _look_at_weights(path, contents)
        return
    workdir = Workdir(path)
    workdir.require_run()
    folders = step_folders(workdir.checkpoints)
    for folder in folders:
        yield _look_at_checkpoint(folder, contents)
    for name in aside(workdir.checkpoints):
        yield _Finding(name, _num_bytes(workdir.checkpoints / name), "", "set aside by a run", False)
    if not folders:
        raise CheckpointError(f"{path} has no checkpoint yet")


def _look_at_checkpoint(path: pathlib.Path, contents: bool) -> _Finding:
    holds, problem = "", None
    try:
        manifest = Manifest.read(path)
        holds = f"model of step {manifest.step}" if manifest.data is None else "model and optimizer"
        manifest.verify(path, contents=contents)
    except (CheckpointError, FileError) as error:
        if not path.is_dir():
            return _Finding(path.name, 0, holds, "removed meanwhile: its run goes on", False)
        problem = str(error)
    return _finding(path, holds, problem, contents)


def _look_at_weights(path: pathlib.Path, contents: bool) -> _Finding:
    holds, problem = "", None
    try:
        weights = Weights.open(path)
        holds = f"model of step {weights.step} in {' and '.join(weights.dtypes)}"
        if contents:
            weights.verify()
    except (CheckpointError, DataError, FileError) as error:
        problem = str(error)
    return _finding(path, holds, problem, contents)


def _finding(path: pathlib.Path, holds: str, problem: str | None, contents: bool) -> _Finding:
    state = problem or ("good" if contents else "complete")
    return _Finding(path.name, _num_bytes(path), holds, state, problem is not None)


def _num_bytes(folder: pathlib.Path) -> int:
    total = 0
    with system_errors(folder, "read"):
        for file in folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # of a run that goes on
                total += file.stat().st_size if file.is_file() else 0
    return total


def _print(finding: _Finding) -> None:
    parts = [finding.name.rjust(10), f"{finding.num_bytes / 1e6:12,.1f} MB", finding.holds, finding.state]
    print("  ".join(part for part in parts if part), flush=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> program.ArgumentParser:
    parser = program.ArgumentParser(prog="python -m rat_jax.checkpoints", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="{export,import,list,verify}")
    command = commands.add_parser("export", help="write a model's weights as a folder of safetensors files")
    command.add_argument("workdir")
    command.add_argument("folder", help="missing or empty")
    command.add_argument("--step", type=int, help="of this checkpoint; left out: the newest good one")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the files")
    command.set_defaults(run=_export)
    command = commands.add_parser("import", help="make a workdir from a folder of safetensors files")
    command.add_argument("folder")
    command.add_argument("workdir", help="missing or empty")
    command.set_defaults(run=_import)
    for name, run, text in (
        ("list", _list, "steps, sizes, and what is complete"),
        ("verify", _verify, "read all files and compare them with what was written"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("path", help="a workdir, or a folder of safetensors files")
        command.set_defaults(run=run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    return program.run_command(_parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())
