"""What is saved keeps its format: `testdata/formats.json` holds the fields and names of every saved file.

Files that were written once must be read for ever. A field may be added where it has a default; one that is gone, has
another type or is required changes the format, and so does any change of a model's arrays or of a header's keys, which
have no defaults: raise the format's version, keep reading the older one, and record anew with
`python -m tests.test_formats`.
"""

import dataclasses
import functools
import json
import pathlib
import typing
from typing import Any

import jax
import pytest

from rat_jax.checkpoints import manifest, weights, workdir
from rat_jax.checkpoints.store import abstract_model
from rat_jax.config import Config
from rat_jax.data import corpus, token_header
from rat_jax.mixers import MIXERS, MixerConfig
from rat_jax.sharding import leaf_names
from tests.small import small_model_config

RECORDED = pathlib.Path(__file__).parent / "testdata/formats.json"


def fields(cls: type, prefix: str = "") -> dict[str, list[Any]]:
    """Type, and whether there is a default, of every field of a dataclass and of those inside it."""
    found, hints = {}, typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and not issubclass(hint, MixerConfig):
            found |= fields(hint, f"{prefix}{field.name}.")
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        found[f"{prefix}{field.name}"] = [str(hint).replace("typing.", ""), has_default]
    return found


def parameters(kind: str) -> dict[str, list[Any]]:
    """Names and shapes in a checkpoint of a small model of one mixer."""
    params = abstract_model(small_model_config((kind,), qk_norm=True))[1]
    leaves = zip(leaf_names(params), jax.tree.leaves(params), strict=True)
    return {name: [str(list(leaf.shape)), False] for name, leaf in leaves}


@functools.cache
def formats() -> dict[str, dict[str, Any]]:
    mixers = {f"config of {kind}": fields(mixer.Config) for kind, mixer in MIXERS.items()}
    arrays = {f"parameters of {kind}": parameters(kind) for kind in MIXERS}
    return {
        "checkpoint manifest": {"version": manifest.FORMAT_VERSION, "fields": fields(manifest.Manifest)},
        **{name: {"version": manifest.FORMAT_VERSION, "fields": found} for name, found in (mixers | arrays).items()},
        "config": {"version": manifest.FORMAT_VERSION, "fields": fields(Config)},
        "workdir": {"version": workdir.FORMAT_VERSION, "fields": fields(Config)},
        "weights": {"version": weights.FORMAT_VERSION, "fields": {key: ["text", False] for key in weights.HEADER_KEYS}},
        "token file": {"version": token_header.FORMAT_VERSION, "fields": fields(token_header.Header)},
        "corpus": {"version": corpus.FORMAT_VERSION, "fields": fields(corpus.Corpus) | fields(corpus.Statistics)},
    }


@pytest.mark.parametrize("name", json.loads(RECORDED.read_text()) if RECORDED.exists() else ["nothing is recorded"])
def test_a_saved_format_changes_with_its_version_alone(name):
    recorded, current = json.loads(RECORDED.read_text())[name], formats()[name]
    assert current["version"] == recorded["version"], (
        f"{name}: record the new version with python -m tests.test_formats"
    )
    changed = {
        field: (there, current["fields"].get(field))
        for field, there in recorded["fields"].items()
        if current["fields"].get(field, [None])[0] != there[0]
    }
    required = [field for field, (_, has_default) in current["fields"].items() if not has_default]
    added = [field for field in required if field not in recorded["fields"]]
    assert not changed and not added, (
        f"{name} changed without a new version: {changed}, new and without default {added}"
    )


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(formats(), indent=1) + "\n")
