"""What one host of several does for all of them: whatever changes a folder that they share."""

import json
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from rat_jax.checkpoints.workdir import CheckpointError
from rat_jax.errors import RatJaxError

T = TypeVar("T", bound=str | int | None)


def on_first_host(action: Callable[[], T]) -> T:
    """Calls `action` on the first host; all hosts, which must call this together, get its result or its error.

    Raises:
      CheckpointError: on the other hosts, with the message of a `RatJaxError` of the first.
    """
    if jax.process_count() == 1:
        return action()
    outcome, error = {}, None
    if jax.process_index() == 0:
        try:
            outcome = {"result": action()}
        except RatJaxError as failure:
            outcome, error = {"error": str(failure)}, failure
    content = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(content.size)))
    content = np.resize(content, size)  # of the first host it is as it was
    outcome = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(content)).tobytes())
    if error is not None:
        raise error
    if "error" in outcome:
        raise CheckpointError(outcome["error"])
    return outcome["result"]
