"""Whether bytes of a file are still those that were written: digests of its blocks, and a reader that checks them.

Block i is bytes i S .. (i + 1) S - 1, S = `BLOCK_BYTES`, the last one shorter; its digest is the first `DIGEST_BYTES`
bytes of its SHA-256. A block is checked when a process first reads it, so that a file costs a run at most one pass of
SHA-256 (1 GB/s a core where the processor has instructions for it, some 400 MB/s elsewhere) and nothing at its start.
Blocks are small since training reads records in random order: the first use of a record hashes a block around it.
"""

import contextlib
import hashlib
import os
import pathlib
import weakref
from collections.abc import Callable, Iterator

import numpy as np

from rat_jax.data import DataError
from rat_jax.files import explain

BLOCK_BYTES = 1 << 16
DIGEST_BYTES = 16
WHOLE_BYTES = 10**9  # splits up to this size are checked as a whole before a run's first step
_RUN_BLOCKS = 64  # that are read at a time when all are checked
_TRIES = 8  # of a read during which the file was changed


def digest(block: bytes | memoryview) -> bytes:
    """What is kept of a block."""
    return hashlib.sha256(block).digest()[:DIGEST_BYTES]


class BlockHasher:
    """Digests of bytes that come in pieces of any size."""

    def __init__(self):
        self._whole = hashlib.sha256()
        self._rest = b""  # of the last block, which is not full yet
        self._digests: list[bytes] = []

    def update(self, content: bytes) -> None:
        """Takes the next bytes."""
        self._whole.update(content)
        content = memoryview(self._rest + content)
        full = len(content) - len(content) % BLOCK_BYTES
        self._digests += [digest(content[start : start + BLOCK_BYTES]) for start in range(0, full, BLOCK_BYTES)]
        self._rest = bytes(content[full:])

    def hexdigest(self) -> str:
        """SHA-256 of all bytes."""
        return self._whole.hexdigest()

    def digests(self) -> bytes:
        """Those of all blocks, one after the other."""
        return b"".join(self._digests) + (digest(self._rest) if self._rest else b"")


def digests_size(num_bytes: int) -> int:
    """Bytes that the digests of so many bytes take."""
    return -(-num_bytes // BLOCK_BYTES) * DIGEST_BYTES


class CheckedReader:
    """A part of a file, open for reading.

    The file may be changed while it is open. Every read looks, after it has its bytes, whether the file's times or size
    are others than before; if they are, no block counts as checked any more, and the read is done again.

    Bytes are read by system calls, not through a memory map, in which a file that was cut short or a failing disk would
    end the process by a signal.
    """

    def __init__(self, path: pathlib.Path, offset: int, size: int, digests: bytes | None):
        """Opens a file.

        Args:
          path: of the file.
          offset: of the part's first byte.
          size: of the part in bytes.
          digests: of its blocks; None: there are none, so that what is read is not checked, and a file that is changed
            while it is open is refused.

        Raises:
          DataError: if the system refuses the file.
        """
        self._path, self._offset, self._size, self._digests = path, offset, size, digests
        try:
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {explain(error)}") from None
        weakref.finalize(self, os.close, self._file)
        self._state = self._look()
        self._is_checked = np.zeros(-(-size // BLOCK_BYTES), bool)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start` .. `stop` - 1 of the part.

        Raises:
          DataError: if a block that holds some of them was changed, naming file and block, or cannot be read.
        """
        for _ in range(_TRIES):
            if self._digests is not None:
                self._check_blocks(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES))
            content = self._pread(start, stop)
            if self._is_as_before():
                return content
        raise DataError(f"{self._path} keeps being changed while it is read: let nothing write to it")

    def read_ahead(self, start: int, stop: int) -> None:
        """Has the system read bytes, and the blocks that a `read` of them would check, while others are in use.

        Reads that wait for a disk so wait together. It is no more than advice: what is wrong shows when they are read.
        """
        first, last = start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)
        if self._digests is not None and not self._is_checked[first:last].all():
            start, stop = first * BLOCK_BYTES, min(last * BLOCK_BYTES, self._size)
        if hasattr(os, "posix_fadvise") and start < stop:  # not on macOS
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._file, self._offset + start, stop - start, os.POSIX_FADV_WILLNEED)

    def check_all(self, progress: Callable[[int], None]) -> None:
        """Compares all blocks with their digests, whether they were checked before or not.

        Args:
          progress: called with the number of bytes of each run of blocks.

        Raises:
          DataError: as for `read`.
        """
        num_blocks = len(self._is_checked)
        for first in range(0, num_blocks, _RUN_BLOCKS):
            stop = min(first + _RUN_BLOCKS, num_blocks)
            self._is_checked[first:stop] = False
            self._check_blocks(first, stop)
            progress(min(stop * BLOCK_BYTES, self._size) - first * BLOCK_BYTES)
        if not self._is_as_before():
            raise DataError(f"{self._path} was changed while it was checked: let nothing write to it")

    def pieces(self) -> Iterator[bytes]:
        """All bytes in order, unchecked."""
        step = _RUN_BLOCKS * BLOCK_BYTES
        for start in range(0, self._size, step):
            yield self._pread(start, min(start + step, self._size))

    def _check_blocks(self, first: int, stop: int) -> None:
        while first < stop:
            if self._is_checked[first]:
                first += 1
                continue
            end = first + 1
            while end < stop and not self._is_checked[end]:
                end += 1
            start = first * BLOCK_BYTES
            content = memoryview(self._pread(start, min(end * BLOCK_BYTES, self._size)))
            for block in range(first, end):
                self._check(block, content[block * BLOCK_BYTES - start : (block + 1) * BLOCK_BYTES - start])
            self._is_checked[first:end] = True
            first = end

    def _check(self, block: int, content: memoryview) -> None:
        if digest(content) != self._digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]:
            start = self._offset + block * BLOCK_BYTES
            raise DataError(
                f"{self._path}: block {block} of {len(self._is_checked)} (bytes {start} to "
                f"{start + len(content) - 1}) is not what was written there: the file was changed, or its disk fails; "
                f"restore it, or prepare it again"
            )

    def _is_as_before(self) -> bool:
        """False if the file was changed since it was last looked at; then no block counts as checked."""
        now = self._look()
        if now == self._state:
            return True
        if self._digests is None:
            if now[1:] == self._state[1:]:  # its name, owner or rights were changed
                return True
            raise DataError(
                f"{self._path} was changed while it was in use, and its format has no digests of blocks to see where: "
                f"restore it, or prepare it again"
            )
        self._state = now
        self._is_checked[:] = False
        return False

    def _look(self) -> tuple[int, int, int]:
        """When the file was changed: its inode, its content; and its size."""
        try:
            found = os.fstat(self._file)
        except OSError as error:
            raise DataError(f"{self._path} cannot be read: {explain(error)}") from None
        return found.st_ctime_ns, found.st_mtime_ns, found.st_size

    def _pread(self, start: int, stop: int) -> bytes:
        """Bytes of the part. One call gives all of them but at the end of a file or above 2 GB."""
        start, size = self._offset + start, stop - start
        try:
            content = os.pread(self._file, size, start)
            while 0 < len(content) < size and (more := os.pread(self._file, size - len(content), start + len(content))):
                content += more
        except OSError as error:
            raise DataError(f"{self._path} cannot be read at byte {start}: {explain(error)}") from None
        if len(content) < size:
            raise DataError(
                f"{self._path} was cut short while it was in use: {len(content)} of {size} bytes are left at byte "
                f"{start}; restore it, or prepare it again"
            )
        return content
