"""What hosts do for each other: one for all whatever changes a folder that they share, and what is decided by it.

File systems show a file to one host earlier than to another: hosts that look for themselves may decide differently, and
then wait for each other without end.
"""

import json
import pathlib
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # the store of texts that its processes share has no public name
from jax.experimental import multihost_utils

from rat_jax.checkpoints.workdir import CheckpointError
from rat_jax.errors import RatJaxError, RunStopped
from rat_jax.files import in_words

T = TypeVar("T", bound=str | float | list | dict | None)  # what JSON can hold
R = TypeVar("R")
_SHARED_SECS = 60.0  # in which a file system shows one host what another wrote: NFS remembers what was there so long
_ERROR = "error:"  # name of a value that is none
_HEAR_SECS = 3600.0  # for what takes long: a host that dies meanwhile is noticed otherwise


def on_first_host(action: Callable[[], T]) -> T:
    """Calls `action` on the first host; all hosts, which must call this together, get its result or its error.

    Raises:
      CheckpointError, RunStopped: on the other hosts, with the message of a `RatJaxError` or an `OSError` of the first;
        the second where a program ends with 1 for it.
    """
    if jax.process_count() == 1:
        return action()
    outcome, error = {}, None
    if jax.process_index() == 0:
        try:
            outcome = {"result": action()}
        except (RatJaxError, OSError) as failure:
            refused = isinstance(failure, RatJaxError) and not isinstance(failure, RunStopped)
            outcome, error = {"error": in_words(failure), "refused": refused}, failure
    content = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(content.size)))
    content = np.resize(content, size)  # of the first host it is as it was
    outcome = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes())
    if error is not None:
        raise error
    if "error" in outcome:
        raise (CheckpointError if outcome["refused"] else RunStopped)(outcome["error"])
    return outcome["result"]


def on_all_hosts(action: Callable[[], R]) -> R:
    """Calls `action` on every host, which all must do together; where it fails on one, it fails on all.

    Args:
      action: takes no part of the others; its result is each host's own.

    Raises:
      CheckpointError: naming the host, where it failed on another one alone.
    """
    if jax.process_count() == 1:
        return action()
    result, error = None, None
    try:
        result = action()
    except (RatJaxError, OSError) as failure:
        error = failure
    messages = gathered(None if error is None else in_words(error))
    if error is not None:
        raise error
    for number, message in enumerate(messages):
        if message is not None:
            raise CheckpointError(f"process {number}: {message}")
    return result


def gathered(value: T) -> list[T]:
    """What each host gives, in their order. All must call this together."""
    if jax.process_count() == 1:
        return [value]
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(content.size)).reshape(-1)
    rows = multihost_utils.process_allgather(np.pad(content, (0, int(sizes.max()) - content.size)))
    return [json.loads(np.asarray(row[:size]).tobytes()) for row, size in zip(rows, sizes, strict=True)]


def difference_from_first(values: Mapping[str, Any]) -> str | None:
    """The first host whose values differ from the first one's, with field and both; None: all are alike.

    All must call this together.
    """
    first, *others = gathered(dict(values))
    for number, other in enumerate(others, 1):
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                return f"{name} is {other.get(name)!r} for process {number} and {first.get(name)!r} for process 0"
    return None


def check_shared(file: pathlib.Path) -> None:
    """Checks that all hosts see a file as the first one does, which has written it. All must call this together.

    Raises:
      CheckpointError: naming the hosts that do not.
    """
    if jax.process_count() == 1:
        return
    content = on_first_host(file.read_text)
    until = time.monotonic() + _SHARED_SECS
    while not (sees := _holds(file, content)) and time.monotonic() < until:
        time.sleep(0.2)
    hosts = gathered([sees, platform.node()])
    if blind := [f"process {number} on {host}" for number, (sees, host) in enumerate(hosts) if not sees]:
        raise CheckpointError(
            f"{file.parent} is not shared: {', '.join(blind)} did not see {file.name}, which process 0 on "
            f"{hosts[0][1]} wrote there, within {_SHARED_SECS:g} s; choose a --workdir on storage that all hosts share"
        )


def _holds(file: pathlib.Path, content: str) -> bool:
    try:
        return file.read_text() == content
    except OSError:
        return False


def tell(key: str, value: T) -> None:
    """Leaves a value for other hosts, from any thread: only the main threads may gather."""
    distributed.global_state.client.key_value_set(key, json.dumps(value))


def hear(key: str, host: int) -> T:
    """What a host tells under a key, waiting for it.

    Raises:
      CheckpointError: if it is nothing, for an hour; or what stopped the host (`tell_error`).
    """
    try:
        text = distributed.global_state.client.blocking_key_value_get(key, int(_HEAR_SECS * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise CheckpointError(f"process {host} did not tell its part: {error}") from None
    value = json.loads(text)
    if isinstance(value, dict) and _ERROR in value:
        raise CheckpointError(f"process {host}: {value[_ERROR]}")
    return value


def tell_error(key: str, error: Exception) -> None:
    """Has who hears the key fail, too."""
    tell(key, {_ERROR: str(error)})


def forget(key: str) -> None:
    """Removes what was told under keys that begin with KEY/; nothing where one host is all."""
    if jax.process_count() > 1:
        distributed.global_state.client.key_value_delete(f"{key}/")
