"""The convolved heads' Triton kernels: interpreted, compiled ahead of time, traced through jax-triton, on a GPU."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("triton", reason="triton is installed on Linux only")
pytest.importorskip("torch", reason="triton's interpreter works on torch tensors")

from pallas_kernels.convolved_heads import triton, triton_tiling
from pallas_kernels.convolved_heads.shape import ConvolvedHeadsShape
from pallas_kernels.convolved_heads.triton_backward import backward_launch
from pallas_kernels.convolved_heads.triton_forward import forward_launch
from pallas_kernels.convolved_heads.triton_tiling import Tiling
from tests.jax_triton import require_jax_triton
from tests.pallas_kernels import triton_compile, triton_interpreter
from tests.pallas_kernels.convolved_heads import triton_twin
from tests.pallas_kernels.convolved_heads.triton_twin import CASES, RESULTS

SLOW = (
    "whole",
    "one_tap",
    "two_taps",
    "one_token",
    "wide_heads",
    "chosen_blocks",
)  # the code of these is in the others
LIMITS = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1e-2}
LAUNCHES = {forward_launch: "d f i", backward_launch: "d f i d d d"}  # the dtypes of inputs: d is the call's


@pytest.fixture(scope="module")
def interpreted() -> Callable[[str], dict[str, float]]:
    """Errors of a case, from a process in which triton interprets kernels: one for quick cases, one for the slow."""

    @functools.cache
    def errors(are_slow: bool) -> dict[str, dict[str, float]]:
        names = [name for name in CASES if (name in SLOW) == are_slow]
        return triton_interpreter.errors_of("tests.pallas_kernels.convolved_heads.triton_twin", names)

    return lambda name: errors(name in SLOW)[name]


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in CASES])
def test_values_and_gradients_are_those_of_float64(interpreted, name):
    found, limit = interpreted(name), LIMITS[CASES[name].tiling.shape.dtype]
    assert set(found) == set(RESULTS)
    assert all(error < limit for error in found.values()), found  # false for NaN too


def test_float16_errs_at_most_twice_as_much_as_plain_xla(interpreted):
    found, plain = interpreted("float16"), triton_twin.errors_of_xla(CASES["float16"])
    assert all(found[name] <= 2 * plain[name] for name in RESULTS), (found, plain)


def sizes(key_dim=128, value_dim=128, **changes) -> ConvolvedHeadsShape:
    """Of a layer of 2,048 channels."""
    shape = ConvolvedHeadsShape(64, 4096, 16, key_dim, value_dim, 4, "bfloat16", segmented=False)
    return dataclasses.replace(shape, **changes)


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize(
    "shape",
    [
        sizes(),
        pytest.param(sizes(segmented=True), marks=pytest.mark.slow),
        pytest.param(sizes(256, 512, num_heads=6, segmented=True), marks=pytest.mark.slow),
        pytest.param(sizes(96, 192, taps=1), marks=pytest.mark.slow),
        pytest.param(sizes(dtype="float32", segmented=True), marks=pytest.mark.slow),
    ],
    ids=lambda x: f"{x.key_dim}_{x.dtype}{'_segmented' * x.segmented}" if isinstance(x, ConvolvedHeadsShape) else x,
)
@pytest.mark.parametrize("make", LAUNCHES)
def test_kernels_compile_for_gpus(make, shape, capability):
    """Loads are copied into shared memory ahead of their use."""
    launch = make(Tiling(shape))
    dtypes = tuple({"d": shape.dtype, "f": "float32", "i": "int32"}[letter] for letter in LAUNCHES[make].split())
    found = triton_compile.compile_launch(launch, dtypes, capability)
    assert launch.name in found.text
    assert found.registers <= (144 if shape.key_dim <= 128 else 255) and found.spilled_bytes == 0
    assert "cp.async.c" in found.text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float64"}, "float64 is none of"),
        ({"key_dim": 264}, "nearest: 256"),
        ({"taps": 5}, "nearest: 4"),
        ({"batch": 70_000}, "65535"),
    ],
)
def test_unsupported_calls_say_why(changes, reason):
    assert triton_tiling.unsupported_reason(sizes()) is None
    assert reason in triton_tiling.unsupported_reason(sizes(**changes))
    with pytest.raises(ValueError, match="every size must be 1 or more"):
        sizes(value_dim=0)


@pytest.mark.parametrize(
    ("batch", "tokens", "spans"), [(64, 4096, 16), (2, 131_072, 512), (1, 100, 2), (1, 64, 1), (512, 1024, 4)]
)
def test_rows_are_cut_where_they_are_few(batch, tokens, spans):
    tiling = Tiling(sizes(batch=batch, tokens=tokens))
    for blocks in (tiling.forward_blocks, tiling.backward_blocks):
        assert tiling.span(blocks) % blocks.piece == 0
        assert (tiling.spans(blocks) - 1) * tiling.span(blocks) < tokens <= tiling.spans(blocks) * tiling.span(blocks)
    assert tiling.spans(tiling.forward_blocks) == spans


@pytest.mark.parametrize("packed", [False, True])
def test_kernels_are_traced_under_their_names(packed):
    require_jax_triton()
    shape = ConvolvedHeadsShape(2, 70, 3, 20, 40, 4, "bfloat16", segmented=packed)
    projected, taps = jnp.zeros((2, 70, 240), jnp.bfloat16), jnp.zeros((4, 240))
    positions = jnp.zeros((2, 70), jnp.int32) if packed else None

    def both(projected, taps):
        results = triton.convolved_heads_forward(shape, projected, taps, positions)
        return *results, *triton.convolved_heads_backward(shape, projected, taps, positions, *results)

    text = str(jax.make_jaxpr(both)(projected, taps))
    assert all(make(Tiling(shape)).name in text for make in LAUNCHES)
    found = [(x.shape, x.dtype) for x in jax.eval_shape(both, projected, taps)]
    keys, values = ((2, 70, 3, 20), jnp.bfloat16), ((2, 70, 3, 40), jnp.bfloat16)
    assert found == [keys, keys, values, (projected.shape, jnp.bfloat16), (taps.shape, jnp.float32)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_on_the_gpu(name, dtype):
    case = CASES[name]
    tiling = dataclasses.replace(case.tiling, shape=dataclasses.replace(case.tiling.shape, dtype=dtype))
    case = dataclasses.replace(case, tiling=tiling)
    found, plain = triton_twin.errors(case, device="cuda"), triton_twin.errors_of_xla(case)
    assert all(found[name] <= 2 * plain[name] + 1e-6 for name in RESULTS), (found, plain)
