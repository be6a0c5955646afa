"""Checkpoints: complete, verified and of one format, however the process that wrote them ended.

WORKDIR/checkpoints/STEP/
  params/          the model's parameters, by name
  optimizer/       the optimizer's state, by name; not there where only a model was saved
  manifest.json    written last: config, position of the data, versions, arrays, sizes and SHA-256 of all other files

owner       the one process that may write in a workdir      manifest  what a checkpoint says of itself
hosts       what the first of several hosts does for all     arrays    a checkpoint's arrays on disk, by Orbax
workdir     the folder of a run, run.json                    folder    what is in checkpoints/, set aside or removed
run_log     log.jsonl                                        store     saving, resuming and loading
model_workdir  a workdir that holds a model alone
weights     a model's weights as safetensors files, for `python -m rat_jax.checkpoints`
"""

from rat_jax.checkpoints.manifest import Manifest
from rat_jax.checkpoints.model_workdir import save_model
from rat_jax.checkpoints.store import Checkpoints, LoadedModel, load_model
from rat_jax.checkpoints.weights import Weights, write_weights
from rat_jax.checkpoints.workdir import CheckpointError, Workdir

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "LoadedModel",
    "Manifest",
    "Weights",
    "Workdir",
    "load_model",
    "save_model",
    "write_weights",
]
