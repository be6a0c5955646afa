"""Whether a run is to end early, which all its hosts must decide alike."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from rat_jax.interrupts import Interrupts


def agreed(interrupts: Interrupts, step: int, every_steps: int) -> bool:
    """Whether to end after `step`: as soon as a signal came; with other hosts at a multiple of `every_steps`.

    All hosts get the same answer for the same step.
    """
    if jax.process_count() == 1:
        return interrupts.requested
    if step % every_steps:
        return False
    return bool(multihost_utils.process_allgather(np.asarray(interrupts.requested)).any())
