"""Operations of a step, peaks of devices, and how well a run uses them."""

import types

import pytest

from rat_jax.flops import flops_per_token, mfu, peak_flops
from tests.tiny_run import tiny_config


def counted_keys(kind, seq_len):
    """Keys that a token sees, on average over a row, counted one by one: a window of 5, chunks of 4."""
    counts = {
        "attention": [t + 1 for t in range(seq_len)],
        "local_attention": [min(t, 5) + 1 for t in range(seq_len)],
        "rattention": [min(t, 5) + 1 + 2 * 8 for t in range(seq_len)],  # a state of 16 by 8, written and read
        "rat": [t // 4 + 1 for t in range(seq_len)],
        "rnn": [0] * seq_len,
    }[kind]
    return sum(counts) / seq_len


@pytest.mark.parametrize("kind", ["attention", "local_attention", "rat", "rattention", "rnn"])
@pytest.mark.parametrize("seq_len", [4, 16])
def test_flops(kind, seq_len):
    model = tiny_config("data", model__pattern=(kind,)).model
    expected = 6 * 1000 + 12 * 16 * 2 * counted_keys(kind, seq_len)
    assert flops_per_token(model, 1000, seq_len) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, flops):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == flops


def test_mfu_is_the_share_of_the_peak():
    """By hand: 6 * 1000 + 12 * 16 * (2.5 + 2.5) = 6960 operations a token, 1e10 tokens/s, a peak of 312e12."""
    model = tiny_config("data", model__pattern=("attention",)).model
    assert (model.width, model.num_layers) == (16, 2)
    device = types.SimpleNamespace(device_kind="NVIDIA A100-SXM4-80GB")
    assert mfu(model, 1000, 4, 1e10, device) == pytest.approx(0.22307692, rel=1e-7)


def test_mfu_is_not_known_where_the_peak_is_not():
    model = tiny_config("data").model
    assert mfu(model, 1000, 4, 1e10, types.SimpleNamespace(device_kind="cpu")) is None
