"""The release's `.pth` files: there and back through workdirs, and what is refused."""

import contextlib
import errno
import json
import math
import os
import pickle
import re
import sys
import types
import zipfile

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rat_jax import release
from rat_jax.checkpoints.store import load_model
from rat_jax.config import ConfigError
from rat_jax.data.tokenizer import ByteTokenizer, IdTokenizer, load_tokenizer
from rat_jax.release import __main__ as commands
from rat_jax.release import file as release_file
from rat_jax.release.file import read_release_file
from rat_jax.release.weights import release_state_dict
from tests.full_disk import fill_disk
from tests.release.test_weights import recording

torch = pytest.importorskip("torch")


class EasyDict(dict):
    """Pickled as the package's class is: the entries twice, as items and as attributes."""

    def __init__(self, values):
        for key, value in values.items():
            value = EasyDict(value) if type(value) is dict else value
            super().__setattr__(key, value)
            super().__setitem__(key, value)


EasyDict.__module__, EasyDict.__qualname__ = "easydict", "EasyDict"


@contextlib.contextmanager
def easydict_at_hand(monkeypatch):
    """As if the package were installed."""
    module = types.ModuleType("easydict")
    module.EasyDict = EasyDict
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "easydict", module)
        yield


def write(path, contents, monkeypatch):
    with easydict_at_hand(monkeypatch):
        torch.save(contents, path)
    return path


def nested(depth):
    """A dictionary in a dictionary in a dictionary ..."""
    values = {}
    for _ in range(depth):
        values = {"a": values}
    return values


def nest_in_file(path, text, depth):
    """Puts `nested(depth)` where a file of torch.save says `text`: pickle itself does not write what is so deep."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in parts if name.endswith("data.pkl"))
    before = b"X" + len(text).to_bytes(4, "little") + text.encode()
    assert parts[name].count(before) == 1
    parts[name] = parts[name].replace(before, b"}X\x01\0\0\0a" * depth + b"}" + b"s" * depth)
    with zipfile.ZipFile(path, "w") as archive:
        for part, content in parts.items():
            archive.writestr(part, content)


def published(name, **changes):
    """What a published file holds; compiled names in bfloat16-representable float32, and more than is needed."""
    _, model_config, state_dict = recording(name)
    config = EasyDict({"model": model_config, "task": {"tie_embedding": True}, "data": [1, (2, "x")], "seed": None})
    weights = {f"_orig_mod.{key}": torch.from_numpy(array) for key, array in state_dict.items()}
    moments = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-3}]}
    return {"task": weights, "config": config, "step": 52_452, "optimizer": moments} | changes


def test_import_and_export(tmp_path, monkeypatch, capsys):
    arrays, model_config, state_dict = recording("rat_swa")
    source = write(tmp_path / "released.pth", published("rat_swa"), monkeypatch)
    workdir, copy = tmp_path / "run", tmp_path / "exported.pth"

    assert commands.main(["import", str(source), str(workdir), "--dtype=float32"]) == 0
    assert "step 52452" in capsys.readouterr().out
    loaded = load_model(workdir)
    assert loaded.step == 52_452
    assert loaded.config.data.seq_len == 64
    logits = jax.jit(loaded.model)(arrays["input_ids"])
    assert np.abs(logits - arrays["logits"]).max() < 1e-4

    assert commands.main(["export", str(workdir), str(copy)]) == 0
    assert "easydict" not in sys.modules
    returned = read_release_file(copy)
    assert returned.model_config == model_config
    assert returned.step == 52_452
    assert set(returned.state_dict) == set(state_dict)
    for key, array in state_dict.items():
        np.testing.assert_array_equal(returned.state_dict[key], array, err_msg=key)

    with easydict_at_hand(monkeypatch):  # as the release reads it
        contents = torch.load(copy, weights_only=False)
    assert contents["config"]["model"]["backbone"]["seq_cell1"]["_name_"] == "rat"
    assert type(contents["config"]["model"]["backbone"]) is EasyDict
    assert contents["config"]["task"]["tie_embedding"] is True


def test_import_with_a_tokenizer(tmp_path, monkeypatch, capsys):
    source = write(tmp_path / "released.pth", published("rnn"), monkeypatch)
    tokenizer = ByteTokenizer()
    monkeypatch.setattr(commands, "read_tokenizer", lambda path, eos_token: tokenizer)
    assert commands.main(["import", str(source), str(tmp_path / "run"), "--tokenizer=bytes.model"]) == 2
    assert "bytes.model has 257 tokens, the model of" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    tokenizer = IdTokenizer(61, 0)
    assert commands.main(["import", str(source), str(tmp_path / "run"), "--tokenizer=bytes.model"]) == 0
    assert load_tokenizer(tmp_path / "run" / "tokenizer").hash == tokenizer.hash
    assert load_model(tmp_path / "run").config.model.dtype == "bfloat16"


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("place", ["config", "task", "nested"])
def test_hostile_file_runs_nothing(tmp_path, monkeypatch, capsys, place):
    trace = tmp_path / "it-ran"
    hostile = Hostile(trace)
    contents = published("rnn")
    if place == "nested":
        dict.__setitem__(contents["config"], "data", [hostile])
    else:
        contents[place] = hostile
    source = write(tmp_path / "hostile.pth", contents, monkeypatch)
    assert commands.main(["import", str(source), str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {source} holds ") and ".system, which is neither" in error
    assert "weights_only" not in error
    assert not trace.exists()
    assert not (tmp_path / "run").exists()
    with easydict_at_hand(monkeypatch):
        torch.load(source, weights_only=False)  # the file would run the command
    assert trace.exists()


def test_pickle_without_an_archive_runs_nothing(tmp_path, capsys):
    trace, source = tmp_path / "it-ran", tmp_path / "plain.pth"
    source.write_bytes(pickle.dumps({"task": Hostile(trace)}))
    assert commands.main(["import", str(source), str(tmp_path / "run")]) == 2
    assert "not a file of torch.save" in capsys.readouterr().err
    assert not trace.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {}}, "embedding.wte.weight: missing, of shape (61, 32); backbone.layers.0"),
        ({"task": {"x": "y"}}, "task.x must be a tensor, got str"),
        ({"config": {"data": 1}}, "has no config.model; it has ['data']"),
        ({"config": 3}, "config must be a dictionary"),
        ({"step": -1}, "step must be a whole number"),
        ({"step": 2**31}, "step must be a whole number of 0 or more, below 2**31, got 2147483648"),
        ({"task": {3: "y"}}, "task.3 must be a tensor, got str"),
    ],
)
def test_file_that_does_not_fit_is_refused(tmp_path, monkeypatch, capsys, changes, message):
    source = write(tmp_path / "odd.pth", published("rnn", **changes), monkeypatch)
    assert commands.main(["import", str(source), str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about kinds that it will drop
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.eye(3).to_sparse(), "must be a dense tensor, got a torch.sparse_coo on cpu one"),
        (lambda: torch.eye(3).to_sparse_csr(), "must be a dense tensor, got a torch.sparse_csr on cpu one"),
        (
            lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8),
            "must be a dense tensor, got a quantised",
        ),
        (lambda: torch.eye(3, device="meta"), "must be a dense tensor, got a torch.strided on meta one"),
        (lambda: torch.eye(3).long(), "must be of real numbers, got torch.int64"),
        (lambda: torch.eye(3) * 1j, "must be of real numbers, got torch.complex64"),
        (lambda: torch.zeros(1).expand(10**14), "has shape (100000000000000,), more than is stored of it"),
    ],
)
def test_tensors_that_are_no_plain_arrays_are_refused(tmp_path, monkeypatch, make, message):
    source = write(tmp_path / "odd.pth", published("rnn", task={"x": make()}), monkeypatch)
    with pytest.raises(release.ReleaseError, match=re.escape(f"{source}: task.x {message}")):
        read_release_file(source)


@pytest.mark.parametrize("config", ["DEEP", {"model": "DEEP"}, {"model": {"backbone": "DEEP"}}, {"model": ["DEEP"]}])
def test_nesting_without_end_is_refused(tmp_path, monkeypatch, capsys, config):
    source = write(tmp_path / "deep.pth", published("rnn", config=config), monkeypatch)
    nest_in_file(source, "DEEP", 10_000)
    assert commands.main(["import", str(source), str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert len(error) < 500


@pytest.mark.parametrize("where", ["anywhere", "in the weights"])
def test_a_flipped_bit_is_noticed(tmp_path, monkeypatch, where):
    """Most are in weights, where no other check than a checksum finds them; names and padding may hold some."""
    source = write(tmp_path / "released.pth", published("rnn"), monkeypatch)
    content, whole = source.read_bytes(), read_release_file(source)
    random = np.random.default_rng(0)
    positions = random.integers(0, len(content), 40)
    if where == "in the weights":
        start = content.index(whole.state_dict["_orig_mod.embedding.wte.weight"].tobytes())
        positions = start + random.integers(0, whole.state_dict["_orig_mod.embedding.wte.weight"].nbytes, 10)
    num_refused = 0
    for position in positions.tolist():
        changed = bytearray(content)
        changed[position] ^= 1 << random.integers(8)
        source.write_bytes(changed)
        try:
            found = read_release_file(source)
        except release.ReleaseError as error:
            num_refused += 1
            assert str(source) in str(error) and "\n" not in str(error)
        else:
            assert (found.model_config, found.step) == (whole.model_config, whole.step)
            for name, array in whole.state_dict.items():
                np.testing.assert_array_equal(found.state_dict[name], array)
    assert num_refused >= (10 if where == "in the weights" else 25)


def test_files_that_were_cut_are_refused(tmp_path, monkeypatch):
    source = write(tmp_path / "released.pth", published("rnn"), monkeypatch)
    content = source.read_bytes()
    for size in [0, 1, 30, *np.linspace(100, len(content) - 1, 20).astype(int).tolist()]:
        source.write_bytes(content[:size])
        with pytest.raises(release.ReleaseError, match=r"is damaged, or not a file of torch\.save"):
            read_release_file(source)


STRANGE = [None, True, -1, 0, 2**31, 10**5000, 1.5, math.nan, "", "x" * 500, [], {}, {3: 4}, (1,), b"x"]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_no_configuration_is_a_traceback(data):
    _, model_config, _ = recording("rat_swa")
    model_config = json.loads(json.dumps(model_config))
    for _ in range(data.draw(st.integers(1, 3))):
        group = model_config
        while True:
            name = data.draw(st.sampled_from([*group, "unknown"]))
            if isinstance(group.get(name), dict) and data.draw(st.integers(0, 4)):
                group = group[name]
                continue
            value = data.draw(st.sampled_from([*STRANGE, nested(2000), torch.ones(2)]))
            value = dict(value) if isinstance(value, dict) else value  # it may be changed further
            group.pop(name, None) if data.draw(st.booleans()) else group.update({name: value})
            break
        if not model_config:
            break
    try:
        release.model_config_from_release(model_config)
    except ConfigError as error:
        assert len(str(error)) < 2000


def test_missing_damaged_and_existing_files(tmp_path, monkeypatch, capsys):
    def refusal(*arguments):
        assert commands.main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    run = tmp_path / "run"
    assert "there is no file" in refusal("import", tmp_path / "no.pth", run)
    source = write(tmp_path / "released.pth", published("rnn"), monkeypatch)
    content = source.read_bytes()
    cut = tmp_path / "cut.pth"
    cut.write_bytes(content[: len(content) // 2])
    assert "is damaged" in refusal("import", cut, run)
    listed = write(tmp_path / "list.pth", [1, 2], monkeypatch)
    assert "holds a list" in refusal("import", listed, run)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "not empty" in refusal("import", source, tmp_path / "full")
    assert "there is no workdir" in refusal("export", run, tmp_path / "new.pth")
    assert commands.main(["import", str(source), str(run)]) == 0
    assert "is there already" in refusal("export", run, source)
    assert source.read_bytes() == content


def test_a_full_disk(tmp_path, monkeypatch, capsys):
    source = write(tmp_path / "released.pth", published("rnn"), monkeypatch)
    words, there = ["import", str(source), str(tmp_path / "run")], "; no model was saved yet, and the same command"
    for name, code in (("run.json", 2), ("manifest.json", 1)):
        with monkeypatch.context() as patch:
            fill_disk(patch, name)
            assert commands.main(words) == code
        error = capsys.readouterr().err
        assert "No space left on device; make room on its disk" in error
        assert (there in error) == (tmp_path / "run").exists() == (code == 1)
    assert commands.main(words) == 0

    def half(values, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def none(values, path):
        raise RuntimeError(f"File {path} cannot be opened.")

    words, there = ["export", str(tmp_path / "run"), str(tmp_path / "new.pth")], "; nothing is left of it\n"
    for save, code in ((half, 1), (none, 2)):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", save)
            assert commands.main(words) == code
        assert (there in capsys.readouterr().err) == (code == 1)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["released.pth", "run"]


def test_torch_that_is_missing_or_unsafe(monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.5.1+cpu")
        assert commands.main(["import", str(tmp_path / "x.pth"), str(tmp_path / "run")]) == 2
    assert "torch 2.5.1+cpu may run code" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        assert commands.main(["import", str(tmp_path / "x.pth"), str(tmp_path / "run")]) == 2
    assert "need torch" in capsys.readouterr().err


def test_bfloat16_weights_are_read(tmp_path, monkeypatch):
    contents = published("rnn")
    contents["task"] = {name: tensor.bfloat16() for name, tensor in contents["task"].items()}
    read = read_release_file(write(tmp_path / "half.pth", contents, monkeypatch))
    assert all(array.dtype == np.float32 for array in read.state_dict.values())
    returned = release_state_dict(release.model_from_release(read.state_dict, read.model_config))
    name = "backbone.layers.1.hidden_layer.fc1.weight"
    np.testing.assert_array_equal(returned[name], contents["task"][f"_orig_mod.{name}"].float().numpy())


def test_easydict_that_is_installed_is_used_for_writing(monkeypatch, tmp_path):
    _, model_config, state_dict = recording("rnn")
    with easydict_at_hand(monkeypatch):
        contents = release_file.ReleaseFile(state_dict, model_config, 7)
        release_file.write_release_file(tmp_path / "new.pth", contents)
        assert torch.load(tmp_path / "new.pth", weights_only=False)["config"].model.backbone.num_layers == 2
    assert read_release_file(tmp_path / "new.pth").model_config == model_config
