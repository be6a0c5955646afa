"""Checkpoints: complete, verified and of one format, however the process that wrote them ended.

WORKDIR/checkpoints/STEP/
  params/          the model's parameters, by name
  optimizer/       the optimizer's state, by name; not there where only a model was saved
  manifest.json    written last: config, position of the data, versions, arrays, sizes and SHA-256 of all other files
"""

from rat_jax.checkpoints.manifest import Manifest
from rat_jax.checkpoints.store import Checkpoints, LoadedModel, load_model, save_model
from rat_jax.checkpoints.workdir import CheckpointError, Workdir

__all__ = ["CheckpointError", "Checkpoints", "LoadedModel", "Manifest", "Workdir", "load_model", "save_model"]
