"""The owner of a folder: the one process that may write in it.

`owner.json` in the folder names the process that holds it. The file appears whole, with `link`, and with an advisory
lock (`flock`) on it where the file system has them; both end with the process, the lock even when it is killed. Whether
the process that a file names still lives is decided

  by the system's list of processes, where it is one of this machine and this container;
  by the advisory lock, where it is one of another container of this machine;
  by its sign of life where none of these tells, as on another machine: the owner touches the file every minute, and
  one that is ten minutes old, by the clock of the file system, was left. An owner that slept that long looks before it
  writes.

A machine that was started again since holds nothing any more.
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import getpass
import json
import os
import pathlib
import platform
import secrets
import threading
import time
from collections.abc import Iterator

from rat_jax.checkpoints.hosts import check_shared, on_first_host
from rat_jax.checkpoints.workdir import OWNER_FILE, CheckpointError
from rat_jax.errors import RunStopped
from rat_jax.fields import fits
from rat_jax.files import ContentError, FileError, explain, read_object, system_errors
from rat_jax.interrupts import before_exit
from rat_jax.processes import is_running, start_time

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}
_BEAT_SECS = 60.0  # between two signs of life
_SILENT_SECS = 600.0  # after which an owner on another machine counts as gone
_LOOK_SECS = 1.0  # between two looks of an owner that writes often
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # of a machine that sleeps, Linux's second one stands
_TRIES = 20  # of taking a folder that others take and leave meanwhile


class HeldError(CheckpointError):
    """Another process holds the folder; the message says which."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that a folder's file names."""

    host: str
    machine: str | None  # id of the installation
    boot: str | None  # id of the machine's start
    container: str | None  # name space of its process numbers
    pid: int
    started: int | None  # clock ticks since the machine's start
    user: str
    since: str  # UTC
    device: int  # of the folder, as the machine numbers it
    locks: bool  # whether the file system took its advisory lock

    @classmethod
    def here(cls, folder: pathlib.Path, locks: bool) -> "Holder":
        """The process that calls."""
        return cls(
            host=platform.node(),
            machine=_text("/etc/machine-id"),
            boot=_text("/proc/sys/kernel/random/boot_id"),
            container=_container(),
            pid=os.getpid(),
            started=start_time(os.getpid()),
            user=_user(),
            since=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            device=folder.stat().st_dev,
            locks=locks,
        )

    @classmethod
    def read(cls, file: pathlib.Path) -> "Holder":
        """The process that a file names.

        Raises:
          FileNotFoundError: if it is gone.
          ContentError: if it holds something else.
        """
        values = read_object(file)
        hints = {field.name: field.type for field in dataclasses.fields(cls)}
        if set(values) != set(hints) or not all(fits(hint, values[name]) for name, hint in hints.items()):
            raise ContentError(f"{file} is damaged: it does not say who holds the folder")
        return cls(**values)

    def is_gone(self, here: "Holder") -> bool:
        """Whether the process surely has ended; `here.locks` says that this one could take the file's advisory lock."""
        same_host = (self.host, self.machine) == (here.host, here.machine)
        if self.boot != here.boot:
            return same_host and None not in (self.boot, here.boot, self.machine)
        if self.boot is None and not same_host:
            return False
        if self.container == here.container:
            return not is_running(self.pid, self.started)
        return self.locks and here.locks and self.device == here.device

    def is_seen_by(self, here: "Holder") -> bool:
        """Whether the list of processes tells, so that signs of life decide nothing."""
        return self.boot is not None and (self.boot, self.container) == (here.boot, here.container)

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user} on {self.host}, since {self.since}"


class Owner:
    """The calling process as the owner of a folder."""

    def __init__(self, file: pathlib.Path, descriptor: int):
        """Used by `owned` alone."""
        self._file = file
        self._descriptor = descriptor  # open, for the advisory lock
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="owner", daemon=True)
        self._heart.start()
        self._looked_secs = time.clock_gettime(_CLOCK)

    def check(self) -> None:
        """Looks whether the folder is still this process's.

        Raises:
          HeldError: if somebody took the file away, or the folder is gone.
        """
        now = time.clock_gettime(_CLOCK)
        if not _is_at(self._descriptor, self._file):
            raise HeldError(
                f"{self._file} was removed or replaced: this process no longer owns the folder and writes nothing in "
                f"it any more"
            )
        self._looked_secs = now

    def check_often(self) -> None:
        """`check`, for what is written at every step: looks once a second at most.

        A look asks the file server, which can take as long as a step. One a second is enough: another process takes
        the folder only after ten minutes without a sign of life, and who slept that long looked longer ago.
        """
        if time.clock_gettime(_CLOCK) - self._looked_secs > _LOOK_SECS:
            self.check()

    def _beat(self) -> None:
        """Gives signs of life until the end."""
        while not self._ended.wait(_BEAT_SECS):
            with contextlib.suppress(OSError):  # of a file server that is away: the next one may come through
                os.utime(self._descriptor)

    def leave(self) -> None:
        """Takes the file away, if it is still this process's."""
        if _is_at(self._descriptor, self._file):
            self._file.unlink(missing_ok=True)

    def release(self) -> None:
        """Ends the ownership."""
        self._ended.set()
        self._heart.join()
        try:
            self.leave()
        finally:
            os.close(self._descriptor)


@contextlib.contextmanager
def owned(folder: pathlib.Path) -> Iterator[Owner | None]:
    """Makes this process the owner of a folder within the block; the folder is made if it is missing.

    A folder that was made for it and is empty afterwards is removed again. Of several hosts, which must call this
    together, the first owns the folder for all; the others get None.

    Raises:
      HeldError: if another process is the owner, or may be.
      CheckpointError: if a host does not see the folder of the first.
      FileError: if the system refuses to make the folder or to write in it.
      RunStopped: if the block ended well and the system refuses to remove the file.
    """
    with contextlib.ExitStack() as stack:
        owners = []
        on_first_host(lambda: owners.append(stack.enter_context(_owned(folder))))
        check_shared(folder / OWNER_FILE)
        yield owners[0] if owners else None


@contextlib.contextmanager
def _owned(folder: pathlib.Path) -> Iterator[Owner]:
    """`owned` on the first host."""
    with system_errors(folder, "made"):
        made = _make(folder)
    try:
        try:
            owner = _take(folder)
        except OSError as error:
            raise FileError(f"{folder} cannot be written in: {explain(error)}") from error
        try:
            with before_exit(owner.leave):
                yield owner
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to report
                owner.release()
            raise
        try:
            owner.release()
        except OSError as error:
            raise RunStopped(f"all is done, but {folder / OWNER_FILE} cannot be removed: {explain(error)}") from error
    finally:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # not empty, as it should be
                path.rmdir()


def _make(folder: pathlib.Path) -> list[pathlib.Path]:
    """Makes a folder; returns those that were missing, from the top."""
    missing = []
    for path in (folder, *folder.parents):
        if path.is_dir():
            break
        missing.insert(0, path)
    for path in missing:
        path.mkdir(exist_ok=True)  # another process may have been quicker
    return missing


def _take(folder: pathlib.Path) -> Owner:
    file = folder / OWNER_FILE
    for _ in range(_TRIES):
        descriptor = _create(folder, file)
        if descriptor is not None:
            return Owner(file, descriptor)
        _clear_if_stale(folder, file)
    raise HeldError(f"{file} is held by processes that come and go, or by children of one that has ended: try again")


def _create(folder: pathlib.Path, file: pathlib.Path) -> int | None:
    """Makes the file, complete and locked; returns its open descriptor, None if it is there already."""
    own = _partial(file)
    descriptor = os.open(own, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        locks = _lock(descriptor) is not None
        os.write(descriptor, json.dumps(dataclasses.asdict(Holder.here(folder, locks)), indent=2).encode() + b"\n")
        os.fsync(descriptor)
        try:
            os.link(own, file)
        except FileExistsError:
            if os.fstat(descriptor).st_nlink == 1:  # else it is this one: the answer of a file server was lost
                os.close(descriptor)
                return None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if file.exists():  # without links two processes that start at the same instant are not told apart
                os.close(descriptor)
                return None
            os.rename(own, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise
    finally:
        with contextlib.suppress(OSError):
            own.unlink(missing_ok=True)
    return descriptor


def _clear_if_stale(folder: pathlib.Path, file: pathlib.Path) -> None:
    """Removes the file of a process that has ended.

    Raises:
      HeldError: if its process lives, or may live.
    """
    try:
        descriptor = _open(file)
    except FileNotFoundError:  # left meanwhile
        return
    try:
        locked = _lock(descriptor)
        try:
            holder = Holder.read(file)
        except FileNotFoundError:
            return
        except ContentError as error:
            raise HeldError(f"{error}; if no process uses {folder}, remove {file.name} in it") from None
        here = Holder.here(folder, locked is True)
        if not holder.is_gone(here) and (holder.is_seen_by(here) or not _is_silent(file, descriptor)):
            raise HeldError(_held(folder, file, holder))
        if locked is False:  # another process is just clearing it
            time.sleep(0.05)
            return
        if _is_at(descriptor, file):  # else another process cleared it, and may hold the folder already
            aside = _partial(file)
            os.rename(file, aside)
            if not _is_at(descriptor, aside):  # only without advisory locks: another one cleared and took it just now
                os.rename(aside, file)
                return
            aside.unlink()
    finally:
        os.close(descriptor)


def _is_silent(file: pathlib.Path, descriptor: int) -> bool:
    """Whether the owner's last sign of life is long ago, by the clock that dates the files there."""
    now = _partial(file)
    try:
        now.touch()
        return now.stat().st_mtime - os.fstat(descriptor).st_mtime > _SILENT_SECS
    finally:
        now.unlink(missing_ok=True)


def _partial(file: pathlib.Path) -> pathlib.Path:
    """A name that no other process uses."""
    return file.with_name(f"{file.name}.{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}.partial")


def _open(file: pathlib.Path) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_CLOEXEC)  # NFS locks only what is open for writing
    except PermissionError:  # of another user
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC)


def _held(folder: pathlib.Path, file: pathlib.Path, holder: Holder) -> str:
    return (
        f"{folder} is in use by {holder}; nothing was changed. Wait until it ends, or choose another --workdir; if "
        f"that process surely runs no more, remove {file} (ten minutes after its end every machine sees that)"
    )


def _lock(descriptor: int) -> bool | None:
    """Takes the advisory lock: True; False if another process has it; None if the file system has no such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _is_at(descriptor: int, file: pathlib.Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        there = file.stat()
    except OSError:
        return False
    here = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _container() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _text(path: str) -> str | None:
    try:
        return pathlib.Path(path).read_text(errors="replace").strip() or None
    except OSError:
        return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a number without a name
        return str(os.getuid())
