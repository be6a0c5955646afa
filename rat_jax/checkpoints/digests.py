"""Sizes and SHA-256 of a checkpoint's files: of several hosts each reads a part."""

import concurrent.futures
import hashlib
import heapq
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

import jax

from rat_jax.checkpoints.hosts import hear, tell
from rat_jax.data.workers import available_cpus

S, T = TypeVar("S"), TypeVar("T")
_WRITER = re.compile(r"(?:^|/)ocdbt\.process_(\d+)/")  # folders of Orbax that one process alone writes


def sha256(file: pathlib.Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def in_parallel(function: Callable[[S], T], arguments: Collection[S]) -> Iterator[T]:
    """Results in order, by a thread a CPU: for functions that wait, or that hash, which holds no lock.

    A checkpoint of 1.3 billion parameters and its optimizer has 16 GB, some ten seconds of one CPU.
    """
    with concurrent.futures.ThreadPoolExecutor(available_cpus()) as pool:
        yield from pool.map(function, arguments)


def shares(sizes: Mapping[str, int], num_hosts: int) -> list[list[str]]:
    """The names of files by host, of about as many bytes each; all hosts find the same."""
    dealt: list[list[str]] = [[] for _ in range(num_hosts)]
    loads = [(0, host) for host in range(num_hosts)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, host = heapq.heappop(loads)
        dealt[host].append(name)
        heapq.heappush(loads, (load + sizes[name], host))
    return dealt


def tell_own_digests(path: pathlib.Path, key: str) -> None:
    """On hosts other than the first: tells it the sizes and digests of what this one has written.

    Raises:
      OSError: if they cannot be read.
    """
    host = jax.process_index()
    tell(f"{key}/{host}", _digests(path, [name for name in _names(path) if _writer(name) == host]))


def all_digests(path: pathlib.Path, key: str) -> dict[str, list[Any]]:
    """On the first host: [size, digest] of every file by name; what others tell need not be read.

    Raises:
      OSError: if they cannot be read.
      CheckpointError: if another host could not read its own.
    """
    own = _digests(path, [name for name in _names(path) if not 0 < _writer(name) < jax.process_count()])
    told: dict[str, list[Any]] = {}
    for host in range(1, jax.process_count()):
        told |= hear(f"{key}/{host}", host)
    names = _names(path)
    rest = _digests(path, [name for name in names if name not in own and name not in told])
    found = own | told | rest
    return {name: found[name] for name in names}


def _names(path: pathlib.Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def _writer(name: str) -> int:
    match = _WRITER.search(name)
    return 0 if match is None else int(match[1])


def _digests(path: pathlib.Path, names: list[str]) -> dict[str, list[Any]]:
    files = [path / name for name in names]
    return {
        name: [file.stat().st_size, digest]
        for name, file, digest in zip(names, files, in_parallel(sha256, files), strict=True)
    }
