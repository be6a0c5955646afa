"""Manifests: every format version is read as it was written, and what is not as it was written is refused by name."""

import json
import pathlib
import shutil

import pytest

from rat_jax.checkpoints.manifest import FORMAT_VERSION, Manifest, VersionError
from rat_jax.checkpoints.workdir import CheckpointError
from rat_jax.config import config_to_dict
from rat_jax.mixers import LocalAttentionConfig, RatConfig

RECORDED = pathlib.Path(__file__).parents[1] / "testdata"


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION))
def test_recorded_manifests(version, tmp_path):
    folder = tmp_path / "0"
    folder.mkdir()
    shutil.copy(RECORDED / f"manifest_v{version}.json", folder / "manifest.json")
    manifest = Manifest.read(folder)
    model = manifest.config.model
    assert (manifest.step, model.width, model.num_layers, manifest.config.data.first_target_id) == (7, 16, 2, 0)
    assert (model.mlp_kind, model.qk_norm, model.num_kv_heads, model.scan_unroll) == ("gelu", False, None, 1)
    # Versions 1 and 2 hold the settings of every mixer; what the model does not have is dropped.
    assert model.mixers == {"rat": RatConfig(chunk_size=8), "local_attention": LocalAttentionConfig(window=5)}
    manifest.write(folder)
    again = Manifest.read(folder)
    assert again == manifest
    assert "rnn" not in config_to_dict(again.config)["model"]


def test_a_version_that_is_not_known(tmp_path):
    text = (RECORDED / "manifest_v2.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"format_version": 2', '"format_version": 99'))
    with pytest.raises(VersionError, match="format version 99; this code reads 1, 2, 3, 4"):
        Manifest.read(tmp_path)


@pytest.fixture
def values():
    """A manifest of a run, in the last format without a checksum, so that what is changed is looked at itself."""
    values = json.loads((RECORDED / "manifest_v3.json").read_text())
    values["step"] = 5
    values["data"] = {"next_batch": 5, "fingerprint": {"seed": 0}}
    values["arrays"]["optimizer"] = {"count": [[], "int32"]}
    files = values["files"].items()
    values["files"] |= {name.replace("params/", "optimizer/"): value for name, value in files if "params/" in name}
    return values


def read(folder, values, name="5"):
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "manifest.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return Manifest.read(folder / name)


def test_one_of_a_run(values, tmp_path):
    manifest = read(tmp_path, values)
    assert (manifest.step, manifest.folder) == (5, "5")
    manifest.write(tmp_path / "5")
    assert Manifest.read(tmp_path / "5") == manifest


def put(path, value):
    """Sets a value of a manifest."""

    def change(values):
        *groups, name = path
        for group in groups:
            values = values[group]
        values[name] = value

    change.__name__ = f"{'.'.join(path)} = {value!r}"[:60]
    return change


def drop(path):
    def change(values):
        *groups, name = path
        for group in groups:
            values = values[group]
        del values[name]

    change.__name__ = f"without {'.'.join(path)}"
    return change


ARRAY = ("arrays", "params", "embedding")
FILE = ("files", "params/_METADATA")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(["data", "next_batch"], 4), r"data\.next_batch must be step, 5, got 4"),
        (put(["data", "next_batch"], 5.0), r"data\.next_batch must be step"),
        (put(["data"], {}), "data must have next_batch and fingerprint"),
        (put(["data"], []), "data must have next_batch and fingerprint"),
        (put(["data", "fingerprint"], {}), "fingerprint must be an object"),
        (put(["data"], None), "arrays must be those of params alone"),
        (put(["step"], None), "step must be a whole number of 0 or more, got None"),
        (put(["step"], -1), "step must be a whole number"),
        (put(["step"], True), "step must be a whole number"),
        (put(["step"], "5"), "step must be a whole number"),
        (put(["step"], 600), r"data\.next_batch must be step, 600"),
        (put(["config", "training", "num_steps"], 4), r"step must lie in 1 \.\. config\.training\.num_steps, 4, got 5"),
        (put(["config", "training", "num_steps"], "6"), r"config\.training\.num_steps must be a whole number, got '6'"),
        (put(["config", "optimizer", "learning_rate"], 10**400), r"learning_rate must be below 2\*\*32"),
        (put(["config", "optimizer", "learning_rate"], float("nan")), "learning_rate must be a finite number, got nan"),
        (put(["config", "model", "pattern"], [["rat"]]), r"pattern\[0\] must be text, got \['rat'\]"),
        (put(["config"], 3), "config must be an object"),
        (put(["versions"], []), "versions must be texts by name"),
        (put(["versions"], {"jax": 1}), "versions must be texts by name"),
        (put(["arrays"], []), "arrays must be those of params and optimizer alone"),
        (put(["arrays"], {}), "arrays must be those of params and optimizer alone"),
        (drop(["arrays", "optimizer"]), "arrays must be those of params and optimizer alone"),
        (put(["arrays", "params"], {}), r"arrays\.params must be an object"),
        (put(ARRAY, [[29, -16], "float32"]), r"arrays\.params\.embedding must be a shape and a dtype"),
        (put(ARRAY, [[29, 16]]), r"arrays\.params\.embedding must be a shape and a dtype"),
        (put(ARRAY, None), r"arrays\.params\.embedding must be a shape and a dtype"),
        (put(["files"], {}), "files lacks params/_METADATA, without which there are no arrays"),
        (put(["files"], None), "files must be an object"),
        (drop(["files", "optimizer/manifest.ocdbt"]), r"files lacks optimizer/manifest\.ocdbt"),
        (put(FILE, [1, "no hash"]), "files.params/_METADATA must be a size and a SHA-256"),
        (put(FILE, [-1, "0" * 64]), "files.params/_METADATA must be a size and a SHA-256"),
        (put(FILE, 7), "files.params/_METADATA must be a size and a SHA-256"),
        (put(["files", "../../other"], [1, "0" * 64]), "must be a path inside the checkpoint"),
        (put(["files", "/etc/passwd"], [1, "0" * 64]), "must be a path inside the checkpoint"),
        (put(["note"], 1), "note is no field of it"),
        (put(["checksum"], "0" * 64), "checksum is no field of it"),
        (drop(["versions"]), "versions is missing"),
        (put(["format_version"], None), "format version None"),
        (put(["format_version"], 3.0), r"format version 3\.0"),
        (put(["format_version"], True), "format version True"),
        (put(["format_version"], [3]), r"format version \[3\]"),
        (put(["format_version"], 4), "its content has changed since it was written"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_fields_that_cannot_be(values, tmp_path, change, message):
    change(values)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, values)
    assert str(tmp_path / "5/manifest.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "7", "[" * 100_000, '{"step": ' + "1" * 5000 + "}", "{", "\ud800"])
def test_files_that_are_no_manifest(tmp_path, text):
    (tmp_path / "5").mkdir()
    (tmp_path / "5/manifest.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        Manifest.read(tmp_path / "5")


@pytest.mark.parametrize("name", ["4", "05", "8", "50"])
def test_one_of_another_folder(values, tmp_path, name):
    with pytest.raises(CheckpointError, match="that of another checkpoint: its folder should be called 5"):
        read(tmp_path, values, name)


def test_a_checksum_finds_every_other_byte(values, tmp_path):
    manifest = read(tmp_path, values)
    manifest.write(tmp_path / "5")
    content = (tmp_path / "5/manifest.json").read_bytes()
    refused = 0
    for place in range(0, len(content), 29):
        changed = bytearray(content)
        changed[place] ^= 1
        (tmp_path / "5/manifest.json").write_bytes(changed)
        try:
            assert Manifest.read(tmp_path / "5") == manifest, place  # of blanks between the values
        except CheckpointError:
            refused += 1
    assert refused > 100
