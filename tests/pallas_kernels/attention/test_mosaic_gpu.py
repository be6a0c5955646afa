"""Softmax attention by the Mosaic GPU kernels: lowered for CUDA, emulated on any machine, and run on a Hopper GPU."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import mosaic_gpu, mosaic_gpu_tiling
from pallas_kernels.attention.shape import AttentionShape
from tests.pallas_kernels import mosaic_emulator
from tests.pallas_kernels.attention.dense import NAMES, Case, make_case, truth

CASES = {
    "packed": {"tokens": 300, "heads": 2, "head_dim": 64, "packed": True},
    "window": {"tokens": 300, "heads": 2, "key_heads": 1, "head_dim": 64, "packed": True, "window": 70},
    "itself": {"tokens": 130, "head_dim": 64, "packed": True, "window": 0},
    "whole": {"tokens": 257, "heads": 4, "key_heads": 2, "head_dim": 128, "window": 130},
    "one_token": {"tokens": 1, "head_dim": 128, "packed": True},
}
SOME = [  # the others take longer to emulate and to lower
    pytest.param(name, marks=[pytest.mark.slow] * (name not in ("window", "one_token"))) for name in CASES
]
LONG = {
    "long": {"tokens": 4160, "heads": 4, "key_heads": 2, "head_dim": 128, "packed": True},
    "long_window": {"tokens": 4160, "heads": 2, "head_dim": 128, "packed": True, "window": 1000},
}
LIMIT = 4e-3  # of the norm, in bfloat16


def shape_of(case: Case, **changes) -> AttentionShape:
    batch, tokens, heads, head_dim = case.query.shape
    sizes = batch, tokens, heads, case.key.shape[2], head_dim
    return AttentionShape(*sizes, "bfloat16", **{"window": case.window, "whole_rows": False} | changes)


@functools.partial(jax.jit, static_argnames="shape")
def forward_and_backward(shape, query, key, value, documents, d_out):
    options = {"scale": shape.head_dim**-0.5, "window": shape.window}
    out, log_sum_exp = mosaic_gpu.forward(shape, query, key, value, documents, **options)
    kept = documents, out, log_sum_exp, d_out
    return out, log_sum_exp, *mosaic_gpu.backward(shape, query, key, value, *kept, **options)


def arrays_of(case: Case) -> tuple:
    query, key, value, d_out = (jnp.asarray(x, jnp.bfloat16) for x in (*case[:3], case.d_out))
    return query, key, value, None if case.documents is None else jnp.asarray(case.documents), d_out


def check_values(case: Case, run) -> None:
    found = dict(zip(NAMES, run(shape_of(case), *arrays_of(case)), strict=True))
    for name, want in truth(case).items():
        x = np.asarray(found[name], np.float64)
        assert x.shape == want.shape
        if name == "log_sum_exp":
            np.testing.assert_array_equal(x < -1e29, want < -1e29)
            x, want = (np.where(y < -1e29, 0, y) for y in (x, want))
            np.testing.assert_allclose(x, want, atol=1e-2)
        else:
            least = 1e-6 * np.linalg.norm(case.d_out)  # of gradients that cancel, as those of scores in a window of 0
            assert np.linalg.norm(x - want) <= LIMIT * np.linalg.norm(want) + least, name  # false for NaN too


@pytest.mark.parametrize("name", SOME)
def test_emulated_values_are_those_of_float64(name, monkeypatch):
    mosaic_emulator.install(monkeypatch, seed=0, all_used=True)
    check_values(make_case(**CASES[name], dtype=jnp.bfloat16), forward_and_backward.__wrapped__)


TOGETHER = {
    "shared": {"tokens": 140, "heads": 4, "key_heads": 2, "head_dim": 64, "packed": True, "window": 70},
    "own_keys": {"tokens": 260, "heads": 4, "head_dim": 128},
}


@pytest.mark.parametrize(
    ("name", "together"),
    [("shared", 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("shared", 2), ("own_keys", 4)))],
)
def test_emulated_programs_go_through_heads_one_after_the_other(name, together, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "heads_together", lambda shape: together)
    mosaic_emulator.install(monkeypatch, seed=1)
    check_values(make_case(**TOGETHER[name], dtype=jnp.bfloat16), forward_and_backward.__wrapped__)


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "together"),
    [(32, 8192, 16, 4), (32, 8192, 6, 2), (32, 8192, 5, 1), (1, 8192, 16, 1), (2, 8192, 16, 2)],
)
def test_heads_are_gone_through_together_where_programs_are_many(batch, tokens, heads, together):
    shape = AttentionShape(batch, tokens, heads, heads, 128, "bfloat16", window=512, whole_rows=True)
    assert mosaic_gpu_tiling.heads_together(shape) == together


@pytest.mark.parametrize("name", SOME)
def test_kernels_lower_for_cuda_with_the_shapes_of_the_call(name):
    case = make_case(**CASES[name], dtype=jnp.bfloat16)
    traced = forward_and_backward.trace(shape_of(case), *arrays_of(case))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("rat_attention_forward_mosaic", "rat_queries_backward_mosaic", "rat_summaries_backward_mosaic"):
        assert kernel in text
    query, key, value, _, _ = arrays_of(case)
    rows = jax.ShapeDtypeStruct(query.shape[:3], jnp.float32)
    for found, want in zip(traced.out_info, (query, rows, query, key, value), strict=True):
        assert (found.shape, found.dtype) == (want.shape, want.dtype)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "dtype float32 is none of bfloat16, float16"),
        ({"head_dim": 96}, "head_dim 96 is none of 64, 128"),
        ({"capability": (8, 9)}, r"needs a card of compute capability 9\.0"),
        ({"own_keys": False}, "own tokens, not a cache"),
    ],
)
def test_unsupported_calls_say_why(changes, reason):
    shape = shape_of(make_case(**CASES["packed"]))
    assert mosaic_gpu_tiling.unsupported_reason(shape) is None
    assert re.search(reason, mosaic_gpu_tiling.unsupported_reason(dataclasses.replace(shape, **changes)))


@pytest.mark.gpu
@pytest.mark.parametrize("together", [2, 4])
@pytest.mark.parametrize("name", ["long", *TOGETHER])
def test_programs_go_through_heads_one_after_the_other(hopper, name, together, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "heads_together", lambda shape: together)
    case = make_case(**(TOGETHER | LONG)[name], dtype=jnp.bfloat16)
    check_values(case, jax.jit(forward_and_backward.__wrapped__, static_argnames="shape"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CASES, *LONG])
def test_values_are_those_of_float64(hopper, name):
    check_values(make_case(**(CASES | LONG)[name], dtype=jnp.bfloat16), forward_and_backward)
