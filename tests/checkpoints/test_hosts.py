"""What the first host does for all: two hosts played one after the other, the second hears what the first sent."""

import errno
import os

import pytest
from jax.experimental import multihost_utils

from rat_jax.checkpoints.hosts import on_first_host
from rat_jax.checkpoints.manifest import Manifest
from rat_jax.checkpoints.owner import HeldError
from rat_jax.checkpoints.store import Checkpoints, find_checkpoint
from rat_jax.checkpoints.workdir import CheckpointError, Workdir
from rat_jax.errors import RunStopped
from rat_jax.files import FileError
from tests.tiny_run import tiny_config


@pytest.mark.parametrize("result", [None, 7, True, 0.1, "1000", "größer"])
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


@pytest.mark.parametrize(
    ("error", "heard", "message"),
    [
        (FileError("x cannot be read"), CheckpointError, "^x cannot be read$"),
        (RunStopped("it ends"), RunStopped, "^it ends$"),
        (OSError(errno.ESTALE, os.strerror(errno.ESTALE), "run.json"), RunStopped, "^run.json: Stale file handle$"),
        (OSError("read failed"), RunStopped, "^the system: read failed$"),
    ],
    ids=["file", "stopped", "system", "system without a file"],
)
def test_all_get_every_error_that_a_user_can_mend(as_host, error, heard, message):
    def fail():
        raise error

    with pytest.raises(type(error)) as caught:
        as_host(0, lambda: on_first_host(fail))
    assert caught.value is error
    with pytest.raises(heard, match=message):
        as_host(1, lambda: on_first_host(pytest.fail))


@pytest.mark.parametrize("is_model", [False, True])
def test_checkpoints_are_those_that_the_first_host_sees(as_host, tmp_path, monkeypatch, is_model):
    config, workdir = tiny_config("data"), Workdir(tmp_path / "run")
    workdir.mark(config, None)
    data = None if is_model else {"next_batch": 4, "fingerprint": {"seed": 0}}
    arrays = {"params": {"x": [[2], "float32"]}} | ({} if is_model else {"optimizer": {"x": [[2], "float32"]}})
    files = {f"{item}/{name}": [0, "0" * 64] for item in arrays for name in ("_METADATA", "manifest.ocdbt")}
    manifest = Manifest(4, config, data, {"jax": "0"}, arrays, files)
    path = workdir.checkpoints / manifest.folder
    path.mkdir(parents=True)
    manifest.write(path)
    monkeypatch.setattr(Manifest, "verify", lambda *arguments, **settings: None)
    checkpoints = Checkpoints(workdir, config, pytest.fail)
    looks = {
        "peek": checkpoints.peek,
        "latest": checkpoints.latest,
        "find": lambda: find_checkpoint(workdir.path, None, pytest.fail),
    }
    for name, look in looks.items():
        with monkeypatch.context() as patch:
            first = as_host(0, look)
            patch.setattr(Manifest, "read", pytest.fail)  # the file is not there yet for the second host
            patch.setattr(Workdir, "is_new", pytest.fail)
            patch.setattr(Workdir, "require_run", pytest.fail)
            assert as_host(1, look) == first, name
        assert first == (manifest if name == "peek" else (path, manifest))
    assert checkpoints.saved_step == (0 if is_model else 4)
    checkpoints.close()


def test_one_host_alone_sends_nothing(monkeypatch):
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", pytest.fail)
    assert on_first_host(lambda: "result") == "result"
