"""The MLP's products by Mosaic GPU: lowered for CUDA, emulated on any machine, and run on a Hopper GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from pallas_kernels.mlp import mosaic_gpu, mosaic_gpu_gelu
from pallas_kernels.mlp.mosaic_gpu_tiling import ERF_BY, Tiling, tiling_reason
from pallas_kernels.mlp.shape import MlpShape
from tests.pallas_kernels import mosaic_emulator
from tests.pallas_kernels.mosaic_machine import Fault

LIMITS = {"bfloat16": 4e-3, "float16": 6e-4}  # of the norm
REAL = MlpShape(32768, 2048, 8192)  # of a step of configs/rat_1b.py
TILINGS = {
    "alone": Tiling(down=1, band=1),
    "shared_right": Tiling(),
    "shared_left": Tiling(rows=256, columns=128, down=1, beside=2),
    "lag": Tiling(lag=3, band=4),
    "turns": Tiling(columns=128, stages=6, turns=True),
    "low_turns": Tiling(rows=64, stages=3, turns=True, down=1),
    "four": Tiling(columns=128, stages=6, turns=True, beside=2),
}
SMALL = {  # tokens, width, hidden, of tilings of the same names
    "alone": (256, 256, 512),
    "shared_right": (512, 320, 256),
    "shared_left": (512, 256, 512),
    "lag": (512, 256, 256),
    "turns": (512, 384, 384),
    "low_turns": (192, 256, 256),
    "four": (256, 384, 768),
}
PRODUCTS = ("up", "down_backward")


def small(name: str, dtype: str = "bfloat16") -> tuple[MlpShape, Tiling]:
    return MlpShape(*SMALL[name], dtype), dataclasses.replace(TILINGS[name], band=1 if name == "low_turns" else 2)


def draw(shape: MlpShape, product: str) -> tuple[jax.Array, ...]:
    """What the product takes besides the shape."""
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = (shape.width, shape.hidden) if product == "up" else (shape.hidden, shape.width)
    x = jax.random.normal(keys[0], (shape.tokens, shape.width)).astype(shape.dtype)
    matrix = (jax.random.normal(keys[1], sizes) * 2 / shape.width**0.5).astype(shape.dtype)
    if product == "up":
        return x, matrix
    return x, matrix, (2 * jax.random.normal(keys[2], (shape.tokens, shape.hidden))).astype(shape.dtype)


def truth(product: str, x, matrix, u=None) -> tuple[np.ndarray, np.ndarray]:
    x, matrix = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, matrix))
    if product == "up":
        u = x @ matrix
        return u, u * scipy.special.ndtr(u)
    u = np.asarray(u.astype(jnp.float32), np.float64)
    slope = scipy.special.ndtr(u) + u * np.exp(-(u**2) / 2) / np.sqrt(2 * np.pi)
    return (x @ matrix.T) * slope, u * scipy.special.ndtr(u)


def check_values(shape: MlpShape, tiling: Tiling, product: str, multiprocessors: int) -> None:
    arrays = draw(shape, product)
    found = getattr(mosaic_gpu, product)(shape, *arrays, tiling=tiling, multiprocessors=multiprocessors)
    for got, want in zip(found, truth(product, *arrays), strict=True):
        assert got.dtype == shape.dtype
        assert np.linalg.norm(np.asarray(got, np.float64) - want) <= LIMITS[shape.dtype] * np.linalg.norm(want)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("name", TILINGS)
def test_emulated_values_are_those_of_float64(name, product, monkeypatch):
    number = list(TILINGS).index(name)
    mosaic_emulator.install(monkeypatch, seed=number, all_used=True)
    shape, tiling = small(name, "float16" if number == 2 else "bfloat16")
    tiling = dataclasses.replace(tiling, band=1, erf_by=ERF_BY[number % 2])
    check_values(shape, tiling, product, multiprocessors=tiling.parts + number % 3)


@pytest.mark.parametrize("erf_by", ERF_BY)
def test_gelu_is_that_by_erf(erf_by):
    x = np.linspace(-30, 30, 60001, dtype=np.float32)
    exact = x.astype(np.float64)
    slope = scipy.special.ndtr(exact) + exact * np.exp(-(exact**2) / 2) / np.sqrt(2 * np.pi)
    found, found_slope = mosaic_gpu_gelu.gelu_and_slope(jnp.asarray(x), erf_by)
    want = exact * scipy.special.ndtr(exact)
    np.testing.assert_array_equal(found, mosaic_gpu_gelu.gelu(jnp.asarray(x), erf_by))
    np.testing.assert_allclose(found, want, atol=5e-5)
    np.testing.assert_allclose(found_slope, slope, atol=1e-4)
    if erf_by == "exp2":  # of a difference of numbers near 1 the last bits are wrong
        near = exact > -4
        np.testing.assert_allclose(np.asarray(found)[near], want[near], rtol=3e-4, atol=0)


def test_a_stage_that_is_left_too_soon_is_found(monkeypatch):
    mosaic_emulator.install(monkeypatch, seed=1)
    monkeypatch.setitem(mosaic_emulator.NAMES["plgpu"], "wgmma_wait", lambda left: None)
    with pytest.raises(Fault, match="race"):
        check_values(*small("shared_right"), "up", multiprocessors=2)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("name", ["shared_right", "four"])
def test_real_sizes_are_lowered_for_cuda(name, product):
    run = getattr(mosaic_gpu, product)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in jax.eval_shape(lambda: draw(REAL, product))]
    text = (
        jax.jit(lambda *arrays: run(REAL, *arrays, tiling=TILINGS[name], multiprocessors=132))
        .trace(*shapes)
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    assert f"mlp_{product}_mosaic" in text


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"depth": 32}, "depth is 64"),
        ({"stages": 5}, "bytes of shared memory"),
        ({"rows": 256}, "sums take 256 registers"),
        ({"rows": 96}, "no multiple of 64"),
        ({"columns": 128, "turns": True, "lag": 1}, "lag is 0"),
        ({"lag": 4}, "lag is from 0 to 3"),
        ({"down": 4}, "down is 1 or 2"),
        ({"beside": 4}, "beside is 1 or 2"),
        ({"erf_by": "erf"}, "erf_by is one of"),
        ({"band": 3}, "band 3 does not divide 128 tiles"),
    ],
    ids=str,
)
def test_what_a_tiling_may_not_be_is_said(options, reason):
    tiling = Tiling(**options)
    assert reason in tiling_reason(REAL, tiling)
    with pytest.raises(ValueError, match=reason):
        mosaic_gpu.up(REAL, *draw(MlpShape(8, 8, 8), "up"), tiling=tiling, multiprocessors=132)


@pytest.mark.gpu
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("name", TILINGS)
def test_values_on_a_gpu_are_those_of_float64(hopper, name, product):
    shape = MlpShape(4096, 512, 1024)
    check_values(shape, dataclasses.replace(TILINGS[name], band=4), product, jax.devices()[0].core_count)
