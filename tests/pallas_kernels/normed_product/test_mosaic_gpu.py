"""Normed products by Mosaic GPU: lowered for CUDA, emulated on any machine, and run on a Hopper GPU."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from pallas_kernels.launch import mosaic_gpu as launch
from pallas_kernels.normed_product import mosaic_gpu, mosaic_gpu_tiling
from pallas_kernels.normed_product.shape import NormedProductShape
from tests.pallas_kernels import mosaic_emulator
from tests.pallas_kernels.mosaic_machine import Fault

EPSILON = 1e-2  # large enough to be seen in the values
LIMITS = {"bfloat16": 4e-3, "float16": 6e-4}  # of the norm
CASES = {f"{rows}-{'gelu' if gelu else 'plain'}": (rows, gelu) for rows in (1, 5, 16) for gelu in (False, True)}
REAL = {  # of a decode step of configs/rat_1b.py
    "in_proj": NormedProductShape(1, 2048, 6656, "bfloat16"),
    "up": NormedProductShape(16, 2048, 8192, "bfloat16", gelu=True),
}


def draw(shape: NormedProductShape) -> tuple:
    """Rows, scale and matrix."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = 0.2 * jax.random.normal(keys[0], (shape.rows, shape.inputs))
    scale = 1 + 0.3 * jax.random.normal(keys[1], (shape.inputs,))
    matrix = jax.random.normal(keys[2], (shape.inputs, shape.outputs)) * 5 / shape.inputs**0.5
    return x.astype(shape.dtype), scale, matrix.astype(shape.dtype)


def truth(shape: NormedProductShape, arrays: tuple) -> np.ndarray:
    x, scale, matrix = (np.asarray(x.astype(jnp.float32), np.float64) for x in arrays)
    out = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + EPSILON) * scale @ matrix
    return out * 0.5 * (1 + scipy.special.erf(out / np.sqrt(2))) if shape.gelu else out


def plain(shape: NormedProductShape, arrays: tuple) -> jax.Array:
    """By XLA, rounded where the modules of the library round."""
    x, scale, matrix = arrays
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32**2, axis=1, keepdims=True) + EPSILON)
    out = jnp.dot((x32 * inverse * scale[None]).astype(x.dtype), matrix)
    return jax.nn.gelu(out.astype(jnp.float32), approximate=False).astype(out.dtype) if shape.gelu else out


def multiply(shape: NormedProductShape, arrays: tuple) -> jax.Array:
    return mosaic_gpu.multiply(shape, *arrays, epsilon=EPSILON)


def check_values(shape: NormedProductShape, run=multiply) -> None:
    arrays = draw(shape)
    want = truth(shape, arrays)
    found, other = (np.asarray(x, np.float64) for x in (run(shape, arrays), plain(shape, arrays)))
    assert found.shape == want.shape
    error, of_plain = (np.linalg.norm(x - want) / np.linalg.norm(want) for x in (found, other))
    assert error <= LIMITS[shape.dtype]  # false for NaN too
    assert error <= 2 * of_plain


@pytest.fixture
def few_stages(monkeypatch):
    """So little room that the ring of a test's small matrix goes round."""

    def leave(shape, count):
        monkeypatch.setattr(mosaic_gpu_tiling, "SHARED_MEMORY", 0)
        short = -mosaic_gpu_tiling.stages(shape) + count
        monkeypatch.setattr(mosaic_gpu_tiling, "SHARED_MEMORY", short * 2 * 128 * 64)
        assert mosaic_gpu_tiling.stages(shape) == count

    return leave


@pytest.mark.parametrize("name", CASES)
def test_emulated_values_are_those_of_float64(name, monkeypatch, few_stages):
    rows, gelu = CASES[name]
    number = list(CASES).index(name)
    dtype = "float16" if number % 5 == 4 else "bfloat16"
    mosaic_emulator.install(monkeypatch, seed=number, all_used=True)
    shape = NormedProductShape(rows, 768, 128, dtype, gelu=gelu)
    few_stages(shape, 1 + number % 4)
    check_values(shape)


@pytest.mark.parametrize(("inputs", "outputs"), [(128, 64), (384, 192)], ids=lambda size: str(size))
def test_the_least_sizes_are_multiplied(inputs, outputs, monkeypatch):
    mosaic_emulator.install(monkeypatch, seed=3, all_used=True)
    check_values(NormedProductShape(3, inputs, outputs, "bfloat16", gelu=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_sizes_are_multiplied(name, monkeypatch):
    mosaic_emulator.install(monkeypatch, seed=0, all_used=True)
    check_values(REAL[name])


@pytest.mark.parametrize("name", REAL)
def test_the_kernel_lowers_for_cuda(name):
    shape = REAL[name]
    traced = jax.jit(lambda arrays: multiply(shape, arrays)).trace(jax.eval_shape(lambda: draw(shape)))
    assert (traced.out_info.shape, traced.out_info.dtype) == ((shape.rows, shape.outputs), shape.dtype)
    assert "normed_product_mosaic" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", REAL)
def test_real_sizes_fill_the_card_in_one_wave(name):
    shape = dataclasses.replace(REAL[name], rows=1)
    assert mosaic_gpu_tiling.unsupported_reason(shape) is None
    assert mosaic_gpu_tiling.fills_card(shape)
    assert mosaic_gpu_tiling.stages(shape) == 11


@pytest.mark.parametrize(("outputs", "fills"), [(5568, False), (5632, True), (8448, True), (8512, False)])
def test_two_thirds_of_a_wave_fill_the_card(outputs, fills):
    assert mosaic_gpu_tiling.fills_card(NormedProductShape(1, 2048, outputs, "bfloat16")) == fills


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "dtype float32 is none of bfloat16, float16"),
        ({"rows": 17}, "17 rows are more than 16"),
        ({"inputs": 2112}, "2112 inputs are no multiple of 128"),
        ({"outputs": 6660}, "6660 outputs are no multiple of 64"),
        ({"inputs": 16384}, "leave no room for two tiles"),
        ({"capability": (8, 9)}, r"needs a card of compute capability 9\.x, this one has 8\.9"),
        ({"capability": (10, 0)}, r"this one has 10\.0"),
    ],
)
def test_unsupported_products_say_why(changes, reason):
    assert re.search(reason, mosaic_gpu_tiling.unsupported_reason(dataclasses.replace(REAL["in_proj"], **changes)))


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match="1 or more"):
        NormedProductShape(0, 128, 64, "bfloat16")


def unchecked_wait(ring, step):
    return ring.tiles.at[step % ring.stages]


def hasty_wait(ring, step, wait=launch.Ring.wait, release=launch.Ring.release):
    tile = wait(ring, step)
    release(ring, step)
    return tile


def no_wait_for_rows(barrier, wait=mosaic_emulator.NAMES["plgpu"]["barrier_wait"]):
    return None if barrier.barriers[0].name.startswith("rows_loaded") else wait(barrier)


def nothing(*_, **options):
    pass


RING, PLGPU = launch.Ring, mosaic_emulator.NAMES["plgpu"]
MISTAKES = {  # what replaces what, and the fault
    "stores that are not committed": ([(PLGPU, "commit_smem", nothing)], "not committed"),
    "stages that are not released": ([(RING, "release", nothing)], "deadlock"),
    "stages that are released at once": ([(RING, "wait", hasty_wait), (RING, "release", nothing)], "race"),
    "tiles that are not waited for": ([(RING, "wait", unchecked_wait)], "race"),
    "rows that are not waited for": ([(PLGPU, "barrier_wait", no_wait_for_rows)], "race"),
    "results that are not waited for": ([(PLGPU, "wait_smem_to_gmem", nothing)], "race|nothing waited for"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_emulator_finds(mistake, monkeypatch, few_stages):
    changes, message = MISTAKES[mistake]
    mosaic_emulator.install(monkeypatch, seed=0)
    for place, name, instead in changes:
        (monkeypatch.setitem if isinstance(place, dict) else monkeypatch.setattr)(place, name, instead)
    shape = NormedProductShape(2, 1024, 64, "bfloat16")
    few_stages(shape, 2)
    with pytest.raises(Fault, match=message):
        multiply(shape, draw(shape))


@pytest.mark.gpu
@pytest.mark.parametrize("name", REAL)
def test_values_are_those_of_float64(hopper, name):
    run = jax.jit(multiply, static_argnums=0)
    for rows in (1, 2, 5, 11, 16):
        check_values(dataclasses.replace(REAL[name], rows=rows), run)
    check_values(NormedProductShape(3, 384, 192, "float16"), run)
