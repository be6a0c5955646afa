"""Compiled programs that outlive their process: JAX's persistent compilation cache, kept in files of our own form.

JAX finds a compiled program by its operations, XLA's flags and options, jaxlib's version, and the kind and version of
the devices; not by a CPU's instructions, which the folder's name stands for here. Its own files can be read while they
are half written, stay as they are once damaged, and grow without end. These come into being whole, carry a digest that
is compared before a program is run, are replaced when it differs, and the longest unused go when they are many.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import jax
from absl import flags
from jax._src import compilation_cache as jax_cache  # it has no public place for files of another form
from jax._src.compilation_cache_interface import CacheInterface
from jax.experimental.compilation_cache import compilation_cache as public_cache

from rat_jax.files import explain
from rat_jax.paths import PathError, local_path

OFF = "off"
MAX_BYTES = 4 * 2**30  # of all programs below one root; a program has 2 KB to some MB
_FLAG = "compilation_cache"
_SUFFIX, _PARTIAL = ".program", "partial-"
_PARTIAL_SECS = 3600.0  # after which a file that is not whole is a killed process's
_THRESHOLD = "jax_persistent_cache_min_compile_time_secs"
_CPU_FIELDS = (
    *("vendor_id", "cpu family", "model", "model name", "flags"),  # x86
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features"),  # ARM
)

_thread = threading.local()

flags.disclaim_key_flags()  # `--help` shows the flag with those of the program that asks for it


def define_cache_flag() -> Callable[[], "ProgramFiles | None"]:
    """Defines `--compilation_cache`.

    Returns:
      What does as `use_cache` says, and returns the same, once flags are parsed.
    """
    holder = flags.DEFINE_string(
        _FLAG,
        None,
        f"folder that keeps compiled programs for later runs, or {OFF}; left out: in the user's cache folder",
    )
    return lambda: use_cache(holder.value)


def use_cache(choice: str | None) -> "ProgramFiles | None":
    """Has later processes find the programs that this one compiles, and this one those of earlier ones; says where.

    A folder that cannot be used is said, and programs are compiled anew.

    Args:
      choice: a folder; `off`; None: the folder of JAX_COMPILATION_CACHE_DIR, which is left to JAX, or else
        `rat_jax/compiled` in the user's cache folder (XDG_CACHE_HOME, ~/.cache). JAX_ENABLE_COMPILATION_CACHE=0 is
        heeded then. Of the processes of one job JAX has only the first write programs, so that the others find them
        in a folder that all share: None is `off` there.

    Returns:
      The files, for programs that are kept in other ways than JAX's; None: there are none, or they are JAX's own.

    Raises:
      PathError: if `choice` names no folder.
    """
    if choice == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if choice is None and not jax.config.jax_enable_compilation_cache:
        return None
    if choice is None and (users := jax.config.jax_compilation_cache_dir):
        say(f"{users}, as JAX_COMPILATION_CACHE_DIR says")
        return None
    if choice is None and jax.distributed.is_initialized():
        say(f"none for several processes; --{_FLAG} takes a folder that all of them share")
        return None
    try:
        root = _users_root() if choice is None else local_path(choice, f"--{_FLAG}")
    except PathError as error:
        if choice is not None:
            raise
        say(f"none, programs are compiled anew: {error}")
        return None
    folder = root / folder_name()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what is in it is run: nobody else is to write there
        tempfile.TemporaryFile(dir=folder).close()
        _remove_unused(root)
    except OSError as error:
        say(f"none, programs are compiled anew: {folder} cannot be used: {explain(error)}")
        return None
    say(str(folder))
    jax_cache.get_file_cache = lambda path: (_FilesOfJax(pathlib.Path(path)), path)
    public_cache.reset_cache()
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # XLA's files there have no digests
    if _THRESHOLD.upper() not in os.environ:
        jax.config.update(_THRESHOLD, 0.0)  # a start compiles many small programs, at 20 ms each
    return ProgramFiles(folder)


def folder_name() -> str:
    """Of the programs of this version of JAX and this kind of CPU."""
    return f"jax-{jax.__version__}-{platform.machine()}-{hashlib.sha256(_cpu().encode()).hexdigest()[:12]}"


class ProgramFiles(CacheInterface):
    """Files of compiled programs, for JAX to read and write. Several processes may do so at a time."""

    def __init__(self, folder: pathlib.Path):
        self._path = folder
        self._usable = True

    def get(self, key: str) -> bytes | None:
        """The program of a key; None if there is none, or only a damaged one."""
        if not self._usable:
            return None
        file = self._file(key)
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._give_up(file, error)
            return None
        size = hashlib.sha256().digest_size
        program = content[size:]
        if content[:size] != _digest(key, program):
            say(f"{file} is damaged; the program is compiled again")
            return None
        with contextlib.suppress(OSError):
            os.utime(file)  # it was of use just now
        return program

    def put(self, key: str, value: bytes) -> None:
        """Writes the program of a key, over what is there."""
        if not self._usable:
            return
        file = self._file(key)
        try:
            with tempfile.NamedTemporaryFile(dir=self._path, prefix=_PARTIAL, delete=False) as partial:
                try:
                    partial.write(_digest(key, value) + value)
                    partial.flush()
                    os.replace(partial.name, file)
                finally:
                    pathlib.Path(partial.name).unlink(missing_ok=True)
        except OSError as error:
            self._give_up(file, error)

    def _file(self, key: str) -> pathlib.Path:
        return self._path / f"{key}{_SUFFIX}"

    def _give_up(self, file: pathlib.Path, error: OSError) -> None:
        self._usable = False
        say(f"none from here on: {file}: {explain(error)}")


class _FilesOfJax(ProgramFiles):
    """Those that JAX reads and writes as it compiles."""

    def get(self, key: str) -> bytes | None:
        return None if getattr(_thread, "compiles_anew", False) else super().get(key)

    def put(self, key: str, value: bytes) -> None:
        if not getattr(_thread, "compiles_anew", False):
            super().put(key, value)


@contextlib.contextmanager
def compiling_anew() -> Iterator[None]:
    """Within the block JAX neither finds nor keeps what this thread compiles.

    A program that JAX has read from a file is not whole when it is written down again: on CPUs it lacks functions.
    """
    _thread.compiles_anew = True
    try:
        yield
    finally:
        _thread.compiles_anew = False


def _digest(key: str, program: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\0" + program).digest()


def _users_root() -> pathlib.Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # to be ignored, by its specification
        base = "~/.cache"
    return local_path(os.path.join(base, "rat_jax", "compiled"), "the user's cache folder")


def _cpu() -> str:
    """What tells CPUs of different instructions apart; the host's name where the system does not say."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = {line for line in lines if line.partition(":")[0].strip() in _CPU_FIELDS}
    return "\n".join(sorted(told)) or platform.node()


def _remove_unused(root: pathlib.Path) -> None:
    """Removes what killed processes left half written and, beyond MAX_BYTES, the programs that were longest unused."""
    programs = []
    for file in root.glob("jax-*/*"):
        with contextlib.suppress(FileNotFoundError):  # removed by another process
            found = file.stat()
            if file.name.endswith(_SUFFIX):
                programs.append((found.st_mtime, found.st_size, file))
            elif file.name.startswith(_PARTIAL) and found.st_mtime < time.time() - _PARTIAL_SECS:
                file.unlink()
    excess = sum(size for _, size, _ in programs) - MAX_BYTES
    for _, size, file in sorted(programs):
        if excess <= 0:
            break
        file.unlink(missing_ok=True)
        excess -= size


def say(text: str) -> None:
    """Tells the user on standard error."""
    print(f"compilation cache: {text}", file=sys.stderr)
