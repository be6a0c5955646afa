"""Event files, which TensorBoard shows: figures by step.

An event file is a row of records: the length of an event in 8 bytes, the masked CRC-32C of these, the event, its masked
CRC-32C. Each is handed to the system as it is made, so that a killed process loses none; the writer of tensorboardX
keeps them for two minutes, in a thread whose errors nobody sees.
"""

import os
import pathlib
import socket
import struct
import time
from collections.abc import Mapping


class EventFile:
    """A new event file in a folder."""

    def __init__(self, folder: pathlib.Path, purge_step: int):
        """Opens it. TensorBoard then drops what other files of the folder hold of `purge_step` and later steps.

        Raises:
          OSError: if the system refuses.
        """
        # Here, since it imports PyTorch where that is installed, which takes seconds.
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import masked_crc32c
        from tensorboardX.summary import scalar

        self._event, self._checksum, self._scalar = event_pb2.Event, masked_crc32c, scalar
        folder.mkdir(parents=True, exist_ok=True)
        secs, nanosecs = divmod(time.time_ns(), 10**9)  # TensorBoard reads files by the order of their names
        name = f"events.out.tfevents.{secs:010}.{socket.gethostname()}.{nanosecs:09}.{os.getpid()}"
        self._file = (folder / name).open("xb", buffering=0)
        self._write(self._event(wall_time=time.time(), file_version="brain.Event:2"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(self._event(wall_time=time.time(), step=purge_step, session_log=start))

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds figures of a step.

        Raises:
          OSError: if the system refuses.
        """
        for name, value in figures.items():
            self._write(self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value)))

    def close(self) -> None:
        self._file.close()

    def _write(self, event) -> None:
        content = event.SerializeToString()
        size = struct.pack("<Q", len(content))
        rest = b"".join(
            [size, struct.pack("<I", self._checksum(size)), content, struct.pack("<I", self._checksum(content))]
        )
        while rest:
            rest = rest[self._file.write(rest) :]
