"""Names kernel outputs so that `jax.checkpoint` saves them instead of recomputing."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

_NAME = "kernel_result"


def save_named(results: Any) -> Any:
    """Marks a pytree of arrays as what a kernel gave; without `saving_named` it changes nothing."""
    return jax.tree.map(lambda x: checkpoint_name(x, _NAME), results)


def saving_named(policy: Callable[..., bool]) -> Callable[..., bool]:
    """A policy of `jax.checkpoint` that saves what `policy` saves and what is marked."""
    return jax.checkpoint_policies.save_from_both_policies(policy, jax.checkpoint_policies.save_only_these_names(_NAME))
