"""Training: one step, the loop around it, and what it shows, records and survives."""

from rat_jax.training.guards import BadBatchesError, NonFiniteError
from rat_jax.training.loop import TrainResult
from rat_jax.training.run import train
from rat_jax.training.step import StepMetrics, TrainState, batch_loss, train_step

__all__ = [
    "BadBatchesError",
    "NonFiniteError",
    "StepMetrics",
    "TrainResult",
    "TrainState",
    "batch_loss",
    "train",
    "train_step",
]
