"""Config files: Python files whose `get_config()` returns a ConfigDict; `--config.FIELD=VALUE` changes a field."""

import dataclasses
import difflib
import importlib.machinery
import inspect
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags
from ml_collections import config_dict, config_flags

from rat_jax.config import Config, config_from_dict, with_absolute_paths
from rat_jax.errors import ConfigError, RatJaxError, require, shown
from rat_jax.paths import local_path

_NAME = "config"  # of the flag, and what stands before the fields in messages
flags.disclaim_key_flags()  # `--help` shows the flag with those of the program that asks for it


def define_config_flag() -> Callable[[], Config]:
    """Defines `--config=FILE`, `--config=FILE:ARGUMENT` for a `get_config` that takes one, and `--config.FIELD=VALUE`.

    Returns:
      What gives the config once flags are parsed. Its paths are absolute: a relative one starts where the command was
      given. Raises `ConfigError` or `PathError`, naming the field.
    """
    arguments: list[str] = []  # of the command line: ml_collections would look for them here and now
    holder = config_flags.DEFINE_config_file(_NAME, None, "file with get_config()", sys_argv=arguments)
    flags.FLAGS[_NAME].parser = _FileParser(arguments)

    return lambda: with_absolute_paths(config_from_dict(holder.value))


def load_config_file(argument: str, name: str) -> config_dict.ConfigDict:
    """What `get_config()` of a file returns.

    Args:
      argument: `FILE`, or `FILE:ARGUMENT` for a `get_config` that takes one.
      name: of the flag, for messages.

    Raises:
      ConfigError, PathError: in one line, also for whatever the file itself raises.
    """
    text, colon, config_argument = argument.partition(":")
    file = local_path(argument if argument[len(text) :].startswith("://") else text, name)
    arguments = [config_argument] if colon else []
    require(file.is_file(), f"there is no config file {file}")
    get_config = getattr(_load(file), "get_config", None)
    require(callable(get_config), f"{file} is not a config file: it has no function get_config()")
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        problem = (
            f"takes no argument: leave out ':{config_argument}'" if colon else f"wants one: {name}={file}:ARGUMENT"
        )
        raise ConfigError(f"get_config() of {file} {problem}") from None
    values = _run_users_code(file, lambda: get_config(*arguments))
    require(
        isinstance(values, config_dict.ConfigDict),
        f"get_config() of {file} must return a ConfigDict, got {shown(values)}",
    )
    return values


class _FileParser(flags.ArgumentParser):
    """Loads the file, and checks the fields that flags name. What is wrong is a `flags.Error` of one line."""

    def __init__(self, arguments: list[str]):
        self._arguments = arguments

    def parse(self, argument: str) -> config_dict.ConfigDict:
        self._arguments[:] = flags.FLAGS.read_flags_from_files(sys.argv, force_gnu=False)
        try:
            values = load_config_file(argument, f"--{_NAME}")
            for field in _changed_fields(self._arguments):
                _check_field(field, values, argument)
            return values.lock()
        except RatJaxError as error:  # a ValueError, to which absl would add a second name of the flag
            raise flags.Error(str(error)) from None
        except config_dict.RequiredValueError:
            raise flags.Error(f"{argument} has a field without a value, a required_placeholder: set it there") from None

    def flag_type(self) -> str:
        return "config file"


def _load(file: pathlib.Path) -> types.ModuleType:
    loader = importlib.machinery.SourceFileLoader("config_file", str(file))  # whatever the file's name ends in
    module = types.ModuleType(loader.name)
    module.__file__ = str(file)
    _run_users_code(file, lambda: loader.exec_module(module))
    return module


def _run_users_code(file: pathlib.Path, call: Callable[[], Any]) -> Any:
    """Calls code of a config file, which may raise anything."""
    try:
        return call()
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        if isinstance(error, SyntaxError) and error.filename == str(file):
            lines.append(error.lineno)
        where = f"{file}, line {lines[-1]}" if lines else str(file)
        raise ConfigError(f"{where}: {type(error).__name__}: {error}") from None


def _changed_fields(arguments: list[str]) -> list[str]:
    """The fields that `--config.FIELD` flags name."""
    matches = (re.match(rf"--?(?:no)?{_NAME}\.([^=]*)", argument) for argument in arguments[1:])
    return [match[1] for match in matches if match]


def _check_field(field: str, values: config_dict.ConfigDict, file: str) -> None:
    if "[" in field:
        whole = field.partition("[")[0]
        raise ConfigError(f"config.{field} is a part of a field: give the whole, --config.{whole}=VALUE")
    group: Any = values
    for name in field.split("."):
        fields = _fields(group)
        if name not in fields:
            raise ConfigError(_no_field(field, values, file))
        group = fields[name]


def _no_field(field: str, values: config_dict.ConfigDict, file: str) -> str:
    if field in set(_dataclass_fields(Config)):
        return f"config.{field} is not set in {file}: set it there, then a flag can change it"
    known = list(_group_fields(values))
    last = field.split(".")[-1]
    near = [name for name in known if name.split(".")[-1] == last]
    near = near or difflib.get_close_matches(field, known, n=1, cutoff=0.8)
    near = near or [name for name in known if difflib.get_close_matches(last, [name.split(".")[-1]], cutoff=0.75)][:3]
    hint = f"did you mean {' or '.join(f'config.{name}' for name in near)}?" if near else f"the fields are in {file}"
    return f"config has no field {field}; {hint}"


def _fields(group: Any) -> dict[str, Any]:
    """What a group holds, values that are still to be set included; nothing for what is no group."""
    return dict(group.items(preserve_field_references=True)) if isinstance(group, config_dict.ConfigDict) else {}


def _group_fields(values: Any, prefix: str = "") -> Iterator[str]:
    for name, value in _fields(values).items():
        yield f"{prefix}{name}"
        yield from _group_fields(value, f"{prefix}{name}.")


def _dataclass_fields(cls: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(cls):
        yield f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.type):
            yield from _dataclass_fields(field.type, f"{prefix}{field.name}.")
