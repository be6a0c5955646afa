"""What the first host does for all: two hosts played one after the other, the second hears what the first sent."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from rat_jax.checkpoints.hosts import on_first_host
from rat_jax.checkpoints.owner import HeldError
from rat_jax.checkpoints.workdir import CheckpointError


@pytest.fixture
def as_host(monkeypatch):
    """Calls a function as one of two hosts; the first must be called first."""
    sent = []

    def call(index, function):
        heard = iter(sent)

        def broadcast(value):
            if index == 0:
                sent.append(np.array(value))
                return value
            first = next(heard)
            assert (value.shape, value.dtype) == (first.shape, first.dtype)
            return first

        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: index)
        monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)
        return function()

    return call


@pytest.mark.parametrize("result", [None, 7, "1000", "größer"])
def test_all_get_the_result_of_the_first(as_host, result):
    assert as_host(0, lambda: on_first_host(lambda: result)) == result
    assert as_host(1, lambda: on_first_host(pytest.fail)) == result


def test_all_get_the_error_of_the_first(as_host):
    def refuse():
        raise HeldError("it is in use")

    with pytest.raises(HeldError, match="it is in use"):
        as_host(0, lambda: on_first_host(refuse))
    with pytest.raises(CheckpointError, match="it is in use"):
        as_host(1, lambda: on_first_host(pytest.fail))


def test_one_host_alone_sends_nothing(monkeypatch):
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", pytest.fail)
    assert on_first_host(lambda: "result") == "result"
