"""A run that several test files read."""

import shutil

import pytest
from flax import nnx

from rat_jax.checkpoints.store import Checkpoints
from rat_jax.model import LanguageModel
from tests.checkpoints.saved_run import CONFIG, new_run, save, times


@pytest.fixture(scope="session")
def model():
    return LanguageModel(CONFIG.model, rngs=nnx.Rngs(0))


@pytest.fixture(scope="session")
def saved(model, tmp_path_factory):
    """A workdir with checkpoints of steps 10, 20 and 30, whose parameters are multiples."""
    workdir = new_run(tmp_path_factory.mktemp("runs") / "run")
    checkpoints = Checkpoints(workdir, CONFIG, lambda message: None)
    for step in (10, 20, 30):
        save(checkpoints, step, times(model, step))
    checkpoints.close()
    return workdir.path


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")
