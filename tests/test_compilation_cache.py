"""Compiled programs in files: found again, never damaged ones, and never the end of a run."""

import contextlib
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import monitoring
from jax._src import compilation_cache as jax_cache

from rat_jax import compilation_cache
from rat_jax.compilation_cache import ProgramFiles, folder_name, use_cache
from rat_jax.paths import PathError
from rat_jax.program_store import ProgramStore
from tests.commands import import_path
from tests.test_program_store import CONFIG, continued

SETTINGS = ("enable_compilation_cache", "compilation_cache_dir", "persistent_cache_enable_xla_caches")
THRESHOLD = "persistent_cache_min_compile_time_secs"


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """The suite runs without a cache, before and after."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in (*SETTINGS, THRESHOLD)}
    factory = jax_cache.get_file_cache
    yield
    jax_cache.get_file_cache = factory
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def answer() -> float:
    """What a program gives; JAX sees it for the first time at every call."""

    def sum_of_squares(x):
        return jnp.sum(x * x)

    return float(jax.jit(sum_of_squares)(jnp.arange(4.0)))


@contextlib.contextmanager
def counted_hits():
    hits = []

    def listen(event, **details):
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    monitoring.register_event_listener(listen)
    yield hits
    monitoring.unregister_event_listener(listen)


@pytest.fixture
def entry(tmp_path, capsys):
    """The file of `answer`'s program; its folder is the cache in use."""
    use_cache(str(tmp_path / "programs"))
    folder = tmp_path / "programs" / folder_name()
    assert capsys.readouterr().err == f"compilation cache: {folder}\n"
    assert folder.stat().st_mode & 0o077 == 0
    assert answer() == 14
    (file,) = folder.glob("jit_sum_of_squares-*.program")
    assert not list(folder.glob("partial-*"))
    return file


def test_a_program_is_found_again(entry):
    os.utime(entry, (1, 1))
    with counted_hits() as hits:
        assert answer() == 14
    assert hits
    assert entry.stat().st_mtime > 1


DAMAGE = {
    "a bit": lambda content: content[:-9] + bytes([content[-9] ^ 4]) + content[-8:],
    "half": lambda content: content[: len(content) // 2],
    "nothing": lambda content: b"",
    "more": lambda content: content + b"x",
    "digest": lambda content: bytes(32) + content[32:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_program_is_not_run_but_made_again(entry, damage, capsys):
    whole = entry.read_bytes()
    entry.write_bytes(DAMAGE[damage](whole))
    with counted_hits() as hits:
        assert answer() == 14
    assert (hits, capsys.readouterr().err) == (
        [],
        f"compilation cache: {entry} is damaged; the program is compiled again\n",
    )
    with counted_hits() as hits:
        assert answer() == 14
    assert (len(hits), capsys.readouterr().err) == (1, "")


def test_a_program_under_another_key_is_damaged(tmp_path, capsys):
    files = ProgramFiles(tmp_path)
    files.put("one", b"program")
    (tmp_path / "one.program").rename(tmp_path / "two.program")
    assert files.get("one") is None and capsys.readouterr().err == ""
    assert files.get("two") is None and "two.program is damaged" in capsys.readouterr().err


def test_a_folder_that_fails_later_is_said_once_and_used_no_more(tmp_path, capsys):
    files = ProgramFiles(tmp_path / "removed")
    files.put("one", b"program")
    said = capsys.readouterr().err
    assert said.startswith(
        f"compilation cache: none from here on: {tmp_path / 'removed' / 'one.program'}: No such file"
    )
    assert said.count("\n") == 1
    (tmp_path / "removed").mkdir()
    files.put("one", b"program")
    assert files.get("one") is None and not list((tmp_path / "removed").iterdir())
    unreadable = ProgramFiles(tmp_path)
    (tmp_path / "one.program").mkdir()
    assert unreadable.get("one") is None and "one.program: Is a directory" in capsys.readouterr().err


def test_a_folder_that_cannot_be_used_is_a_line_and_no_cache(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    jax.config.update("jax_enable_compilation_cache", True)
    for choice in (str(tmp_path / "file"), None):
        use_cache(choice)
        said = capsys.readouterr().err
        assert said.startswith(f"compilation cache: none, programs are compiled anew: {tmp_path / 'file'}")
        assert said.count("\n") == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # no home
    use_cache(None)
    assert "compilation cache: none, programs are compiled anew: the user's cache folder" in capsys.readouterr().err
    assert jax.config.jax_compilation_cache_dir is None
    with pytest.raises(PathError, match="--compilation_cache is 'gs://bucket/x'"):
        use_cache("gs://bucket/x")


def test_what_is_used_when_nothing_is_chosen(tmp_path, monkeypatch, capsys):
    use_cache(None)  # the suite's JAX_ENABLE_COMPILATION_CACHE=0
    assert (jax.config.jax_compilation_cache_dir, capsys.readouterr().err) == (None, "")
    jax.config.update("jax_enable_compilation_cache", True)
    with monkeypatch.context() as patch:
        patch.setattr(jax.distributed, "is_initialized", lambda: True)
        use_cache(None)
        assert "none for several processes; --compilation_cache takes" in capsys.readouterr().err
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    use_cache(None)
    folder = tmp_path / ".cache/rat_jax/compiled" / folder_name()
    assert (jax.config.jax_compilation_cache_dir, folder.is_dir()) == (str(folder), True)
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/mine")
    capsys.readouterr()
    use_cache(None)
    assert capsys.readouterr().err == "compilation cache: gs://bucket/mine, as JAX_COMPILATION_CACHE_DIR says\n"
    assert jax.config.jax_compilation_cache_dir == "gs://bucket/mine"
    use_cache("off")
    assert not jax.config.jax_enable_compilation_cache and capsys.readouterr().err == ""


def test_the_folder_is_of_one_kind_of_cpu(monkeypatch):
    names = {folder_name()}
    for text in ("flags\t\t: fpu avx\n", "flags\t\t: fpu avx avx512f\n", "Features\t: fp asimd\n"):
        monkeypatch.setattr("pathlib.Path.read_text", lambda path, text=text: text + "cpu MHz\t\t: 2000\n")
        names.add(folder_name())
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: "flags\t\t: fpu avx\ncpu MHz\t\t: 3000\n")
    assert folder_name() in names and len(names) == 4

    def refuse(path):
        raise FileNotFoundError

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    for node in ("one", "two"):
        monkeypatch.setattr("platform.node", lambda node=node: node)
        names.add(folder_name())
    assert len(names) == 6


def test_the_longest_unused_go(tmp_path, monkeypatch):
    folder = tmp_path / "jax-0"
    folder.mkdir()
    for age, name in enumerate(("c.program", "b.program", "a.program", "partial-new", "other.txt")):
        (folder / name).write_bytes(bytes(100))
        os.utime(folder / name, (10_000 - age, 10_000 - age))
    (folder / "partial-live").touch()
    monkeypatch.setattr(compilation_cache, "MAX_BYTES", 250)
    use_cache(str(tmp_path))
    assert {file.name for file in folder.iterdir()} == {"c.program", "b.program", "partial-live", "other.txt"}


PROGRAM = """
import sys, jax, jax.numpy as jnp
from rat_jax import compilation_cache
compilation_cache.use_cache(sys.argv[1])
print([float(jax.jit(lambda x, n=n: jnp.sum(jnp.sort(x) ** n))(jnp.arange(64.0))) for n in range(2, 6)])
"""


def test_two_processes_at_once(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": import_path()}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert said[0] == said[1] and said[0][1].count("\n") == 1
    (folder,) = tmp_path.iterdir()
    files = sorted(folder.iterdir())
    assert len(files) >= 4 and all(file.suffix == ".program" for file in files)
    cache = ProgramFiles(folder)
    assert all(cache.get(pathlib.Path(file).stem) for file in files)


@pytest.mark.slow
def test_what_jax_finds_in_its_files_is_compiled_anew_for_the_store(tmp_path):
    """A program that JAX has read cannot be written down again: it would end a later run."""
    store = ProgramStore(use_cache(str(tmp_path)), CONFIG)
    jax.clear_caches()
    expected, _ = continued(None)  # all of it is in JAX's files then
    jax.clear_caches()
    with counted_hits() as hits:
        continued(None)
    assert len(hits) > 4
    assert continued(store)[0] == expected
    jax.clear_caches()
    again, traced = continued(store)
    assert (again, traced) == (expected, [])
