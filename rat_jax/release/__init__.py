"""The PyTorch release of RAT: its weights, configurations and files, read and written (`python -m rat_jax.release`)."""

from rat_jax.release.model_config import ReleaseError, model_config_from_release, release_model_config
from rat_jax.release.weights import model_from_release, release_state_dict

__all__ = [
    "ReleaseError",
    "model_config_from_release",
    "model_from_release",
    "release_model_config",
    "release_state_dict",
]
