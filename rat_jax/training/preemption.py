"""What hosts of a run decide alike: whether to end early, or to save."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def agreed(wanted: bool, step: int, every_steps: int) -> bool:
    """Whether any host wants it after `step`; where there are several, asked at multiples of `every_steps` alone.

    All hosts get the same answer for the same step.
    """
    if jax.process_count() == 1:
        return wanted
    if step % every_steps:
        return False
    return bool(multihost_utils.process_allgather(np.asarray(wanted)).any())
