"""Config files and --config.FIELD flags: whatever is wrong with them is one line, and names what to change."""

import pathlib
import sys

import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st

from rat_jax import program
from rat_jax.config import Config
from rat_jax.config_file import define_config_flag

DEFAULT = pathlib.Path(__file__).parents[1] / "configs" / "default.py"


def parse(*arguments: str) -> Config | int:
    """The config of a command line, or the exit code of what is wrong with it."""
    known, before = set(flags.FLAGS), sys.argv
    sys.argv = ["train.py", *arguments]
    found: list[Config] = []
    try:
        config = define_config_flag()
        code = program.exit_code(lambda: program._parse_and_run(lambda: found.append(config()), ["config"]))
    finally:
        sys.argv = before
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
    return found[0] if found else code


def refusal(capsys, *arguments: str) -> str:
    assert parse(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix("error: ").removesuffix("\n")


def test_fields_change_and_paths_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = parse(f"--config={DEFAULT}", "--config.model.width=64", "--config.data.path=corpora/mine")
    assert config.model.width == 64
    assert config.data.path == str(tmp_path / "corpora" / "mine")
    assert parse(f"--config={DEFAULT}", "--config.data.path=~/mine").data.path == str(tmp_path / "home" / "mine")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("width=256", "config has no field width; did you mean config.model.width?"),
        ("model.widht=3", "config has no field model.widht; did you mean config.model.width?"),
        ("modle.width=3", "config has no field modle.width; did you mean config.model.width?"),
        ("model.width.x=3", "config has no field model.width.x; did you mean config.model.width?"),
        ("zzz=3", f"config has no field zzz; the fields are in {DEFAULT}"),
        (
            "model.pattern[0]=rat",
            "config.model.pattern[0] is a part of a field: give the whole, --config.model.pattern",
        ),
        ("model.width=narrow", "flag --config.model.width=narrow: "),
        ("model.width=0", "config.model.width must be 1 or more, got 0"),
        (f"model.width={10**30}", "config.model.width must be below 2**32, got 1000000000"),
        ("model=3", "flag --config.model=3: "),
        ("model.width", "Missing value for flag --config.model.width"),
        ("data.path=s3://bucket/x", "config.data.path is 's3://bucket/x': s3:// is not read directly: mount it"),
        ("data.path=", "config.data.path is missing: it must be a path, or corpora name several"),
    ],
)
def test_overrides_that_are_wrong_are_named(capsys, override, message):
    assert refusal(capsys, f"--config={DEFAULT}", f"--config.{override}").startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(", "{file}, line 1: SyntaxError: "),
        ("import os\n\ndef get_config():\n    return 1 / 0\n", "{file}, line 4: ZeroDivisionError: division by zero"),
        ("import no_such_module\n", "{file}, line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("width = 3\n", "{file} is not a config file: it has no function get_config()"),
        ("get_config = 3\n", "{file} is not a config file: it has no function get_config()"),
        ("def get_config():\n    pass\n", "get_config() of {file} must return a ConfigDict, got None"),
        ("def get_config(kind):\n    pass\n", "get_config() of {file} wants one: --config={file}:ARGUMENT"),
        (
            "from ml_collections import config_dict as c\n\ndef get_config():\n    return c.ConfigDict({'seed': 3})\n",
            "config.model is missing",
        ),
        (
            "from ml_collections import config_dict as c\n\n"
            "def get_config():\n    return c.ConfigDict({'seed': c.required_placeholder(int)})\n",
            "{file} has a field without a value, a required_placeholder: set it there",
        ),
    ],
)
def test_files_that_are_wrong_are_named(capsys, tmp_path, text, message):
    file = tmp_path / "config.py"
    file.write_text(text)
    assert refusal(capsys, f"--config={file}").startswith(message.format(file=file))


def test_a_field_that_the_file_leaves_out_is_no_unknown_one(capsys, tmp_path):
    file = tmp_path / "config.py"
    file.write_text("from ml_collections import config_dict as c\n\ndef get_config():\n    return c.ConfigDict()\n")
    message = f"config.training.num_steps is not set in {file}: set it there, then a flag can change it"
    assert refusal(capsys, f"--config={file}", "--config.training.num_steps=3") == message


def test_paths_that_are_wrong_are_named(capsys, tmp_path):
    assert refusal(capsys, "--config=no.py") == f"there is no config file {pathlib.Path('no.py').absolute()}"
    assert refusal(capsys, f"--config={tmp_path}") == f"there is no config file {tmp_path}"
    assert "gs:// is not read directly" in refusal(capsys, "--config=gs://bucket/x.py")
    assert refusal(capsys, f"--config={DEFAULT}:rat").endswith("takes no argument: leave out ':rat'")
    assert refusal(capsys).startswith("--config is missing")
    assert "Unable to open flagfile" in refusal(capsys, f"--flagfile={tmp_path / 'no'}")
    assert refusal(capsys, f"--config={DEFAULT}", "extra").startswith("'extra' is no flag")


FIELDS = ["model.width", "model.pattern", "model.rat", "model.rat.chunk_size", "model", "data.path", "seed", "widht"]
FIELDS += ["model.dtype", "optimizer.beta1", "training.wandb_project", "data.segment_documents", "model.num_kv_heads"]
VALUES = [
    "",
    "-1",
    "0",
    "nan",
    "inf",
    "1e999",
    "None",
    "True",
    "'",
    "()",
    "('rat',)",
    "{}",
    "{'kind': 3}",
    "[[[[",
    "\0",
]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.sampled_from(FIELDS) | st.text(max_size=8), st.sampled_from(VALUES) | st.text(max_size=12)),
        max_size=3,
    )
)
def test_no_override_is_a_traceback(overrides):
    result = parse(f"--config={DEFAULT}", *(f"--config.{field}={value}" for field, value in overrides))
    assert isinstance(result, Config) or result == 2
