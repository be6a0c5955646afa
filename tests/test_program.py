"""What the programs share: exit codes, and errors as one line."""

import errno
import os
import subprocess
import sys

import pytest

from rat_jax import program
from rat_jax.errors import ProcessLost, RatJaxError, RunStopped, shown
from tests.commands import ROOT


def outcome(capsys, error: BaseException | None) -> tuple[int, str]:
    def body():
        if error is not None:
            raise error

    return program.exit_code(body), capsys.readouterr().err


def test_exit_codes(capsys):
    assert outcome(capsys, None) == (0, "")
    assert outcome(capsys, RatJaxError("a\n  b\n")) == (2, "error: a; b\n")
    assert outcome(capsys, RunStopped("a")) == (1, "error: a\n")
    assert outcome(capsys, ProcessLost("a")) == (76, "error: a\n")
    full = OSError(errno.ENOSPC, "No space left on device", "/some/file")
    assert outcome(capsys, full) == (1, "error: /some/file: No space left on device; make room on its disk\n")
    assert outcome(capsys, KeyboardInterrupt())[0] == 75
    assert program.exit_code(lambda: program.INTERRUPTED) == 75


def test_a_reader_that_has_ended_is_one_line():
    code = "from rat_jax import program; import sys; sys.exit(program.exit_code(lambda: print('x' * 100_000)))"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "error: what read the output has ended\n")


@pytest.mark.parametrize(("body", "code"), [(lambda: 3, 3), (lambda: 1 // 0, 1)])
def test_the_end_is_told_however_it_comes(monkeypatch, body, code):
    monkeypatch.setattr(program, "_parse_and_run", lambda body, required: body())
    codes = []
    with pytest.raises((SystemExit, ZeroDivisionError)):
        program.run(body, at_end=codes.append)
    assert codes == [code]


def test_bugs_are_tracebacks():
    with pytest.raises(ZeroDivisionError):
        program.exit_code(lambda: 1 // 0)


def test_arguments_that_argparse_cannot_read_are_one_line(capsys):
    parser = program.ArgumentParser(prog="python -m rat_jax.release")
    parser.add_subparsers(required=True, dest="command").add_parser("import").add_argument("file")
    for arguments, message in ((["imports"], "invalid choice: 'imports'"), (["import"], "required: file")):
        assert program.exit_code(lambda words=arguments: parser.parse_args(words)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error
        assert error.count("\n") == 1


def test_values_are_shown_in_one_line():
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    assert shown(nested) == "[[[[...]]]]"
    assert shown({"a": "b\n"}) == "{'a': 'b\\n'}"
    assert len(shown("x" * 1000)) == 100
    assert shown(10**60) == "1" + 60 * "0"
    assert len(shown(10**400)) == 100
    assert shown([10**5000]) == "[a number of 16,610 bits]"
