"""train.py."""

import pathlib

import pytest

from tests.commands import call_script, run_script

REPOSITORY = pathlib.Path(__file__).parent.parent
DEFAULT_CONFIG = f"--config={REPOSITORY / 'configs/default.py'}"


class TestCommand:
    """train.py."""

    def test_an_error_has_no_traceback_and_exits_with_2(self, tmp_path):
        done = run_script("train.py", DEFAULT_CONFIG, f"--workdir={tmp_path / 'run'}", "--config.model.wdth=3")
        assert done.returncode == 2
        assert done.stderr == "error: config has no field model.wdth; did you mean config.model.width?\n"
        assert not (tmp_path / "run").exists()

    def test_data_that_is_not_there_is_such_an_error(self, tmp_path, capsys):
        arguments = [DEFAULT_CONFIG, f"--workdir={tmp_path / 'run'}", "--config.data.path=nowhere"]
        assert call_script("train.py", *arguments) == 2
        nowhere = pathlib.Path("nowhere").absolute()
        assert capsys.readouterr().err.startswith(f"error: {nowhere} is not a prepared corpus")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("flag", "message"),
        [
            ("--workdir=gs://bucket/run", "--workdir is 'gs://bucket/run': gs:// is not read directly"),
            ("--distributed", "--distributed: the other hosts were not found: "),
            ("--process_id=0", "--process_id without --coordinator_address and --num_processes: give all three"),
            ("--lost_after_secs=1", "--lost_after_secs is 1; it must be 5 or more seconds"),
            ("--no_such_flag", "Unknown command line flag 'no_such_flag'"),
        ],
    )
    def test_flags_that_are_wrong_are_named(self, tmp_path, capsys, flag, message):
        assert call_script("train.py", DEFAULT_CONFIG, f"--workdir={tmp_path / 'run'}", flag) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}")
        assert error.count("\n") == 1
        assert not (tmp_path / "run").exists()

    def test_the_home_folder_is_understood(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "notes.txt").write_text("mine")
        assert call_script("train.py", DEFAULT_CONFIG, "--workdir=~/full") == 2
        assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'full'} is not the workdir of a run")

    def test_help_is_no_error(self, capsys):
        assert call_script("train.py", "--help") == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        for part in ("Trains a model", "--workdir:"):
            assert part in printed.out
