"""A corpus, a config of it, and a run that nothing befell, which tests of several files compare others with."""

import shutil

import pytest

from rat_jax.training import train
from tests.tiny_run import make_corpus, tiny_config


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def config(corpus):
    return tiny_config(corpus)


@pytest.fixture(scope="session")
def uninterrupted(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert train(config, workdir).finished
    return workdir


@pytest.fixture
def finished_run(uninterrupted, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(uninterrupted, tmp_path / "run")
