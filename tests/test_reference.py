"""The float64 reference against what the PyTorch release recorded, so that ops may be held against the reference."""

import numpy as np
import pytest

from tests import reference
from tests.release.test_weights import FOLDER, MODELS, recording

PATTERNS = {
    "attention": ("attention",),
    "rnn": ("rnn",),
    "rat": ("rat",),
    "attention_swa": ("attention", "local_attention"),
    "rat_swa": ("rat", "local_attention"),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits(name):
    arrays, _, state_dict = recording(name)
    tokens, want = arrays["input_ids"][:1], arrays["logits"][:1]
    sizes = {"num_heads": 4, "num_groups": 2, "chunk_size": 8, "window": 15}
    logits = reference.language_model(state_dict, tokens, PATTERNS[name], **sizes)
    assert np.abs(logits - want).max() < 1e-5


@pytest.mark.parametrize("feature_map", ["softmax", "relu"])
def test_residual_linear_attention(feature_map):
    with np.load(FOLDER / f"rla_{feature_map}.npz") as file:
        arrays = dict(file)
    inputs = [arrays[name] for name in ("q", "k", "v", "initial_state")]
    assert arrays["feature_map"] == feature_map
    out, state = reference.residual_linear_attention(*inputs, int(arrays["window_size"]), feature_map)
    np.testing.assert_allclose(out, arrays["out"], atol=1e-5)
    np.testing.assert_allclose(state, arrays["final_state"], atol=1e-5)
