"""Attention's Triton kernels of one query a row: interpreted, compiled ahead of time, traced through jax-triton."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("triton", reason="triton is installed on Linux only")
pytest.importorskip("torch", reason="triton's interpreter works on torch tensors")

from pallas_kernels.attention import triton_decode, triton_decode_tiling
from tests.jax_triton import require_jax_triton
from tests.pallas_kernels import triton_compile, triton_interpreter
from tests.pallas_kernels.attention import triton_twin
from tests.pallas_kernels.attention.triton_twin import shape_of

LIMITS = {"float32": 2e-6, "float16": 1e-3}


@pytest.fixture(scope="module")
def interpreted():
    """Errors of all cases, from a process in which triton interprets kernels."""
    return triton_interpreter.errors_of("tests.pallas_kernels.attention.triton_twin", list(triton_twin.CASES))


@pytest.mark.parametrize("name", triton_twin.CASES)
def test_values_are_those_of_float64(interpreted, name):
    limit, found = LIMITS[triton_twin.CASES[name].shape.dtype], interpreted[name]
    assert set(found) == {"out", "log_sum_exp"}
    assert all(error < limit for error in found.values()), found  # false for NaN too


@pytest.mark.parametrize("name", triton_twin.CASES)
def test_slots_from_the_first_to_the_last_that_is_seen(name):
    case = triton_twin.CASES[name]
    found = triton_decode.seen_slots(jnp.asarray(case.visible()))
    assert [x.tolist() for x in found] == case.seen_slots().tolist()


SIZES = {
    "heads": (shape_of(80, 16, 16, 128, dtype="bfloat16"), 4096),
    "ring": (shape_of(64, 16, 4, 128, window=512, dtype="bfloat16"), 513),
    "long_heads": (shape_of(80, 16, 16, 256, dtype="bfloat16"), 4096),
    "many_long_heads": (shape_of(80, 64, 1, 256, dtype="bfloat16"), 4096),
    "float32": (shape_of(80, 16, 16, 128), 4096),
    "many_heads_in_float32": (shape_of(80, 32, 1, 256), 4096),
}


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("name", SIZES)
def test_the_kernels_compile_for_gpus(name, capability):
    """Accumulators stay in registers, keys and values come sixteen bytes at a time while others are multiplied."""
    shape, num_keys = SIZES[name]
    dtypes = (shape.dtype,) * 3 + ("int32",) * 6
    found = triton_compile.compile_launch(triton_decode.decode_launch(shape, num_keys), dtypes, capability)
    assert "attention_decode" in found.text and "cp.async.cg" in found.text
    assert found.registers <= (224 if shape.head_dim <= 128 else 255) and found.spilled_bytes == 0
    assert found.shared_bytes <= 99 * 1024
    joined = triton_compile.compile_launch(triton_decode.join_launch(shape, num_keys), ("float32",) * 3, capability)
    assert "attention_decode_join" in joined.text
    assert joined.registers <= 255 and joined.spilled_bytes == 0


@pytest.mark.parametrize(("key_heads", "head_dim", "num_keys"), [(16, 128, 4096), (4, 128, 32768), (1, 256, 65536)])
def test_the_parts_of_one_long_row_fit_the_registers(key_heads, head_dim, num_keys):
    launch = triton_decode.join_launch(shape_of(1, 16, key_heads, head_dim, dtype="bfloat16"), num_keys)
    found = triton_compile.compile_launch(launch, ("float32",) * 3, 90)
    assert found.registers <= 255 and found.spilled_bytes == 0


@pytest.mark.parametrize(
    ("rows", "key_heads", "num_keys", "splits"),
    [
        (1, 16, 4096, 32),
        (1, 1, 4096, 64),  # no more than tiles
        (1, 1, 65536, 128),  # nor than are joined
        (80, 16, 4096, 1),
        (80, 4, 4096, 2),
        (1024, 1, 4096, 1),
        (70, 1, 4096, 8),
        (1, 1, 63, 1),
        (1, 1, 65, 2),
    ],
)
def test_few_rows_are_split(rows, key_heads, num_keys, splits):
    assert triton_decode_tiling.splits(shape_of(rows, 16, key_heads, 128, dtype="bfloat16"), num_keys) == splits


def test_unsupported_calls_say_why(monkeypatch):
    monkeypatch.setattr(triton_decode_tiling, "missing_dependency", lambda: None)
    shape = shape_of(2, 8, 4, 64)
    assert triton_decode_tiling.unsupported_reason(shape) is None
    assert triton_decode_tiling.unsupported_reason(shape_of(65535, 64, 1, 256, dtype="bfloat16")) is None
    for change, reason in (
        ({"tokens": 2}, "it takes one query a row and the keys of a cache; implementation 'xla' takes all calls"),
        ({"own_keys": True}, "it takes one query a row and the keys of a cache; implementation 'xla' takes all calls"),
        ({"dtype": "float64"}, "dtype float64 is none of bfloat16, float16, float32"),
        ({"head_dim": 257}, "head_dim 257 is above 256: an accumulator would not fit the registers"),
        (
            {"num_heads": 65, "key_heads": 1, "head_dim": 256, "dtype": "bfloat16"},
            "65 query heads a key head, of 256 channels, are too many: with 256 channels and dtype bfloat16 "
            "it takes 64",
        ),
        ({"num_heads": 33, "key_heads": 1, "head_dim": 129}, "with 256 channels and dtype float32 it takes 32"),
        ({"batch": 65536}, "batch 65536 is above 65535, the longest grid axis; split the batch"),
    ):
        assert reason in triton_decode_tiling.unsupported_reason(dataclasses.replace(shape, **change))
    monkeypatch.setattr(triton_decode_tiling, "missing_dependency", lambda: "it needs jax_triton")
    assert triton_decode_tiling.unsupported_reason(shape) == "it needs jax_triton"


def test_calls_are_traced_under_the_kernels_names():
    require_jax_triton()
    shape = shape_of(3, 6, 2, 20, window=9, dtype="bfloat16")
    query, keys = jnp.zeros((3, 1, 6, 20), jnp.bfloat16), jnp.zeros((3, 70, 2, 20), jnp.bfloat16)
    places = (jnp.ones((3, 1), jnp.int32),) * 2, (jnp.ones((3, 70), jnp.int32),) * 2, jnp.ones((3, 70), bool)
    attend = functools.partial(triton_decode.attend, shape)
    text = str(jax.make_jaxpr(attend)(query, keys, keys, *places))
    assert "attention_decode" in text and "attention_decode_join" in text
    found = jax.eval_shape(attend, query, keys, keys, *places)
    assert [(x.shape, x.dtype) for x in found] == [(query.shape, query.dtype), ((3, 1, 6), jnp.float32)]
