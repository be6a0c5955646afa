"""What one host of several does for all of them: whatever changes a folder that they share, and what is decided by it.

File systems show a file to one host earlier than to another: hosts that look for themselves may decide differently, and
then wait for each other without end.
"""

import json
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from rat_jax.checkpoints.workdir import CheckpointError
from rat_jax.errors import RatJaxError, RunStopped
from rat_jax.files import in_words

T = TypeVar("T", bound=str | float | list | None)  # what JSON can hold


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
