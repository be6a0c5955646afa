"""Manifests of every format version there was are read as they were written."""

import pathlib
import shutil

import pytest

from rat_jax.checkpoints.manifest import FORMAT_VERSION, Manifest
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
    with pytest.raises(CheckpointError, match="format version 99; this code reads 1, 2, 3, 4"):
        Manifest.read(tmp_path)
