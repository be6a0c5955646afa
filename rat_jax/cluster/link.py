"""A connection between two processes: objects of JSON, a line each."""

import contextlib
import json
import socket
import threading
from typing import Any

_MAX_BYTES = 1 << 24  # of a line: a config has some 10 KB
_SEND_SECS = 10.0  # a process that reads nothing for so long will not read it at all
Message = dict[str, Any]


class LinkError(Exception):
    """What came is no message, or nothing can be sent: the other end is gone, or is no process of ours."""


class Link:
    """One end of a connection. Any thread may send, one receives."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._rest = b""
        self._lock = threading.Lock()
        connection.settimeout(_SEND_SECS)

    def fileno(self) -> int:
        """For `select`."""
        return self._connection.fileno()

    def send(self, message: Message) -> None:
        """Sends it.

        Raises:
          LinkError: if the other end is gone.
        """
        try:
            with self._lock:
                self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise LinkError(error.strerror or str(error)) from None

    def receive(self) -> list[Message]:
        """The messages that have come, perhaps none yet; to be called when there is something to read.

        Raises:
          LinkError: if the other end is gone, or speaks otherwise.
        """
        try:
            content = self._connection.recv(1 << 16)
        except TimeoutError:
            return []
        except ConnectionResetError:  # what the system says where the other end had not read all
            content = b""
        except OSError as error:
            raise LinkError(error.strerror or str(error)) from None
        if not content:
            raise LinkError("its connection was closed")
        *lines, self._rest = (self._rest + content).split(b"\n")
        if len(self._rest) > _MAX_BYTES:
            raise LinkError("it sends no messages")
        return [_message(line) for line in lines]

    def close(self) -> None:
        """Ends the connection; what was sent still arrives."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
        self._connection.close()


def _message(line: bytes) -> Message:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise LinkError("it sends no messages")
    return message
