"""The meeting of all processes at a job's start: within a stated time all are there, and alike, or all are refused."""

import contextlib
import json
import os
import selectors
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

from rat_jax.cluster.link import Link, LinkError, Message
from rat_jax.cluster.place import Place
from rat_jax.errors import ProcessLost, RatJaxError, shown

_PROTOCOL = "rat_jax meeting 1"
_PATIENCE_SECS = 10.0  # after which is said whom process 0 waits for
_ANSWER_SECS = 10.0  # that an answer of process 0, which judges when its own time is up, may take beyond it
_TRY_SECS = 0.2  # between two tries to reach process 0
Facts = Mapping[str, Any]  # what must be alike, by name; values are those of JSON


class MeetingError(RatJaxError):
    """The processes are not alike, or two say that they are the same one; nothing was changed."""


def meet(place: Place, facts: Facts, within_secs: float) -> dict[int, Link]:
    """Links to the others, by their number: of process 0 to each, of each to process 0.

    Args:
      place: of this process.
      facts: compared with those of process 0.
      within_secs: from this call on.

    Raises:
      ProcessLost: if a process does not come in time, which is named on all.
      MeetingError: if a fact differs: all name the process, the fact and both values.
    """
    deadline = time.monotonic() + within_secs
    facts = json.loads(json.dumps(facts))  # as the others will have it
    if place.process_id == 0:
        with _Reception(place, facts) as reception:
            return reception.receive_all(deadline, within_secs)
    return {0: _go_to(place, facts, deadline, within_secs)}


class _Reception:
    """The meeting as process 0 leads it."""

    def __init__(self, place: Place, facts: Facts):
        self._place, self._facts = place, facts
        self._arrived: dict[int, tuple[Link, Facts, str]] = {}  # link, facts, host
        self._selector = selectors.DefaultSelector()
        try:
            self._server = _listen(place.port)
        except OSError as error:
            reason = os.strerror(error.errno)
            raise MeetingError(f"process 0 cannot listen at {place.address}: {reason}; choose another port") from None
        self._selector.register(self._server, selectors.EVENT_READ)

    def __enter__(self) -> "_Reception":
        return self

    def __exit__(self, *error: object) -> None:
        self._selector.close()
        self._server.close()  # JAX's service listens on this port next; links stay open

    def receive_all(self, deadline: float, within_secs: float) -> dict[int, Link]:
        said, patience = False, time.monotonic() + _PATIENCE_SECS
        while missing := self._missing():
            now = time.monotonic()
            if now >= deadline:
                self._refuse(
                    ProcessLost(
                        f"{_processes(missing)} of {self._place.num_processes} did not come to "
                        f"{self._place.address} within {within_secs:g} s; nothing was changed"
                    )
                )
            if now >= patience and not said:
                said = True
                print(f"waiting for {_processes(missing)} of {self._place.num_processes}", file=sys.stderr, flush=True)
            for key, _ in self._selector.select(min(deadline - now, 1.0)):
                if key.fileobj is self._server:
                    connection, _ = self._server.accept()
                    self._selector.register(Link(connection), selectors.EVENT_READ)
                else:
                    self._hear(key.fileobj)
        for number, (_, facts, host) in sorted(self._arrived.items()):
            if difference := _difference(self._facts, facts):
                self._refuse(MeetingError(f"process {number} ({host}) differs from process 0: {difference}"))
        for link, _, _ in self._arrived.values():
            with contextlib.suppress(LinkError):  # the watch will see
                link.send({"welcome": True})
        return {number: link for number, (link, _, _) in self._arrived.items()}

    def _missing(self) -> list[int]:
        return [number for number in range(1, self._place.num_processes) if number not in self._arrived]

    def _hear(self, link: Link) -> None:
        """One that arrives says who it is; one that leaves may come again."""
        try:
            messages = link.receive()
            refusal = None
            for message in messages:
                refusal = self._admit(link, message)
            if refusal is not None:
                link.send({"refused": refusal})
                raise LinkError(refusal)
        except LinkError:
            self._selector.unregister(link)
            link.close()
            self._arrived = {number: known for number, known in self._arrived.items() if known[0] is not link}

    def _admit(self, link: Link, message: Message) -> str | None:
        """Notes who it is; what is wrong with that, else None."""
        if message.get("protocol") != _PROTOCOL:
            raise LinkError("another program")
        number, of = message["process_id"], message["num_processes"]
        if of != self._place.num_processes:
            return f"process {number} was given --num_processes {of}, and process 0 {self._place.num_processes}"
        if number in self._arrived or number == 0:
            return f"process {number} is there already: each needs a --process_id of its own"
        self._arrived[number] = (link, message["facts"], message["host"])
        return None

    def _refuse(self, error: RatJaxError) -> None:
        kind = "lost" if isinstance(error, ProcessLost) else "refused"
        for link, _, _ in self._arrived.values():
            with contextlib.suppress(LinkError):
                link.send({kind: str(error)})
            link.close()
        raise error


def _go_to(place: Place, facts: Facts, deadline: float, within_secs: float) -> Link:
    """The link to process 0, after its welcome."""
    hello = {
        "protocol": _PROTOCOL,
        "process_id": place.process_id,
        "num_processes": place.num_processes,
        "host": socket.gethostname(),
        "facts": facts,
    }
    reason = "no time was left"
    while (left := deadline - time.monotonic()) > 0:
        try:
            link = Link(socket.create_connection((place.host, place.port), timeout=left))
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            try:
                link.send(hello)
                return _welcomed(link, time.monotonic() + within_secs + _ANSWER_SECS)
            except LinkError as error:  # of JAX's service of an earlier job, say
                reason = str(error)
                link.close()
        time.sleep(_TRY_SECS)
    raise ProcessLost(
        f"process 0 was not reached at {place.address} within {within_secs:g} s: {reason}; nothing was changed. See "
        f"whether it runs, and whether this host may connect to that port"
    )


def _welcomed(link: Link, deadline: float) -> Link:
    with selectors.DefaultSelector() as selector:
        selector.register(link, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not selector.select(left):
                break
            for message in link.receive():
                if "welcome" in message:
                    return link
                if "lost" in message:
                    raise ProcessLost(message["lost"])
                if "refused" in message:
                    raise MeetingError(message["refused"])
    raise LinkError("it does not answer")


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def _difference(first: Facts, other: Facts) -> str:
    """The facts in which a process differs from the first, up to three."""
    names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
    texts = [f"{name} is {shown(other.get(name))} there, {shown(first.get(name))} here" for name in names[:3]]
    return "; ".join(texts) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


def _processes(numbers: list[int]) -> str:
    """`process 3`, or `processes 1, 2 and 7 others`."""
    if len(numbers) == 1:
        return f"process {numbers[0]}"
    shown_ones = ", ".join(map(str, numbers[:20]))
    return f"processes {shown_ones}" + (f" and {len(numbers) - 20} others" if len(numbers) > 20 else "")
