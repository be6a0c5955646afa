"""What the first host does for all: two hosts played one after the other, the second hears what the first sent."""

import errno
import os

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from rat_jax.checkpoints import digests, hosts
from rat_jax.checkpoints import manifest as manifest_module
from rat_jax.checkpoints.digests import sha256, shares
from rat_jax.checkpoints.hosts import check_shared, difference_from_first, gathered, on_all_hosts, on_first_host
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


def test_what_fails_on_one_host_fails_on_all(as_host, monkeypatch):
    """A host's own error is its own; where another one has it, that one is named."""

    def refuse():
        raise FileError("x cannot be read")

    for index in range(2):
        assert as_host(index, lambda: on_all_hosts(lambda: "its own")) == "its own"
        with pytest.raises(FileError, match=r"^x cannot be read$"):
            as_host(index, lambda: on_all_hosts(refuse))
    monkeypatch.setattr(hosts, "gathered", lambda value: [value, "x cannot be read"])
    with pytest.raises(CheckpointError, match=r"^process 1: x cannot be read$"):
        as_host(0, lambda: on_all_hosts(lambda: "its own"))


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


def test_one_host_alone_sends_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", pytest.fail)
    monkeypatch.setattr(multihost_utils, "process_allgather", pytest.fail)
    assert on_first_host(lambda: "result") == "result"
    assert gathered({"a": 1}) == [{"a": 1}]
    assert difference_from_first({"a": 1}) is None
    check_shared(tmp_path / "no file")


@pytest.mark.parametrize("value", [None, [1, None], {"größe": "ä" * 300}])
def test_what_hosts_gather_is_whole(as_host, value):
    assert as_host(1, lambda: gathered(value)) == [value, value]


def test_values_of_other_lengths_are_gathered_whole(as_host, monkeypatch):
    """Rows are as long as the longest; here the other host's is `[]`."""

    def gather(value):
        other = np.asarray(2) if value.ndim == 0 else np.pad(np.frombuffer(b"[]", np.uint8), (0, value.size - 2))
        return np.stack([value, other])

    def call():
        monkeypatch.setattr(multihost_utils, "process_allgather", gather)
        return gathered("long")

    assert as_host(0, call) == ["long", []]


def of_hosts(monkeypatch, *values):
    """What all hosts gave, whatever this one gives."""
    for module in (hosts, manifest_module):
        monkeypatch.setattr(module, "gathered", lambda value: list(values))


def test_a_field_of_other_data_is_named(monkeypatch):
    of_hosts(monkeypatch, {"seed": 1, "hash": "a"}, {"seed": 1, "hash": "a"}, {"seed": 1, "hash": "b"})
    assert difference_from_first({}) == "hash is 'b' for process 2 and 'a' for process 0"
    of_hosts(monkeypatch, {"seed": 1}, {"seed": 1})
    assert difference_from_first({}) is None


def test_storage_that_is_not_shared_is_named(as_host, monkeypatch, tmp_path):
    monkeypatch.setattr(hosts, "_SHARED_SECS", 0.3)
    file = tmp_path / "owner.json"
    file.write_text("mine")
    as_host(0, lambda: check_shared(file))
    as_host(1, lambda: check_shared(file))  # it sees it
    of_hosts(monkeypatch, [True, "a"], [True, "b"], [False, "c"])
    with pytest.raises(
        CheckpointError, match=f"{tmp_path} is not shared: process 2 on c did not see owner.json, which"
    ):
        as_host(0, lambda: check_shared(file))


def test_a_host_that_sees_another_file_does_not_see_it(as_host, monkeypatch, tmp_path):
    monkeypatch.setattr(hosts, "_SHARED_SECS", 0.3)
    file = tmp_path / "owner.json"
    file.write_text("mine")
    as_host(0, lambda: check_shared(file))
    for change in (lambda: file.write_text("another's"), file.unlink):
        change()
        with pytest.raises(CheckpointError, match="is not shared"):
            as_host(1, lambda: check_shared(file))


@pytest.fixture
def checkpoint(tmp_path):
    """A manifest and its files: of two hosts each reads one."""
    names = [f"{item}/{name}" for item in ("params",) for name in ("_METADATA", "manifest.ocdbt")]
    for name in names:
        (tmp_path / "0" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "0" / name).write_text(name)
    files = {name: [len(name), sha256(tmp_path / "0" / name)] for name in names}
    arrays = {"params": {"x": [[2], "float32"]}}
    return Manifest(4, tiny_config("data"), None, {"jax": "0"}, arrays, files), tmp_path / "0"


def test_each_host_reads_a_part_of_a_checkpoint(as_host, monkeypatch, checkpoint):
    manifest, path = checkpoint
    read = []
    monkeypatch.setattr(manifest_module, "sha256", lambda file: read.append(file.name) or sha256(file))
    as_host(0, lambda: manifest.verify_together(path))
    assert read == ["manifest.ocdbt"]  # the larger one
    as_host(1, lambda: manifest.verify_together(path))
    assert read == ["manifest.ocdbt", "_METADATA"]


def test_all_hosts_judge_a_checkpoint_alike(as_host, monkeypatch, checkpoint):
    manifest, path = checkpoint
    of_hosts(monkeypatch, ["it is damaged: x", None], [None, None])
    with pytest.raises(CheckpointError, match=r"^it is damaged: x$"):
        as_host(1, lambda: manifest.verify_together(path))
    of_hosts(monkeypatch, [None, None], [None, "x cannot be read"])
    with pytest.raises(FileError, match=r"^process 1: x cannot be read$"):
        as_host(0, lambda: manifest.verify_together(path))


def test_damage_that_another_host_finds_is_looked_at_by_the_first(as_host, monkeypatch, checkpoint):
    manifest, path = checkpoint
    of_hosts(monkeypatch, [None, None], ["_METADATA is missing", None])
    with pytest.raises(FileError, match=r"^process 1 alone finds: _METADATA is missing"):
        as_host(0, lambda: manifest.verify_together(path))
    (path / "params/_METADATA").write_text("other")
    with pytest.raises(CheckpointError, match="_METADATA has 5 bytes, not 16"):
        as_host(0, lambda: manifest.verify_together(path))


def test_files_are_dealt_out_by_their_bytes():
    sizes = {"a": 7, "b": 1, "c": 4, "d": 3, "e": 1}
    assert shares(sizes, 2) == [["a", "b"], ["c", "d", "e"]]
    assert shares(sizes, 1) == [["a", "c", "d", "b", "e"]]
    assert shares({}, 2) == [[], []]


def test_each_host_reads_what_it_wrote(monkeypatch, tmp_path):
    store = {}
    monkeypatch.setattr(digests, "tell", store.__setitem__)
    monkeypatch.setattr(digests, "hear", lambda key, host: store[key])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for name in ("params/_METADATA", "params/ocdbt.process_0/d/x", "params/ocdbt.process_1/d/y"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    digests.tell_own_digests(tmp_path, "key")
    assert list(store["key/1"]) == ["params/ocdbt.process_1/d/y"]
    read = []
    monkeypatch.setattr(digests, "sha256", lambda file: read.append(file.name) or sha256(file))
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    found = digests.all_digests(tmp_path, "key")
    assert sorted(read) == ["_METADATA", "x"]
    assert found == {
        str(file.relative_to(tmp_path)): [file.stat().st_size, sha256(file)]
        for file in sorted(tmp_path.rglob("*"))
        if file.is_file()
    }
