"""All between two mixers by Mosaic GPU: lowered for CUDA, emulated on any machine, and run on a Hopper GPU."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from pallas_kernels.between_mixers import mosaic_gpu, mosaic_gpu_tiling
from pallas_kernels.between_mixers.shape import BetweenMixersShape
from pallas_kernels.launch import mosaic_gpu as launch
from tests.pallas_kernels import mosaic_emulator
from tests.pallas_kernels.mosaic_machine import Fault

EPSILON = 1e-2  # large enough to be seen in the values
LIMITS = {"bfloat16": 8e-3, "float16": 1e-3}  # of the norm
# Programs of the first have no part in the last product or several of a sum, of the second none in the others.
SMALL = {
    "fewer outputs": BetweenMixersShape(1, 256, 128, 512, 192, "bfloat16"),
    "more outputs": BetweenMixersShape(2, 256, 128, 256, 384, "float16"),
    "no next mixer": BetweenMixersShape(2, 512, 256, 512, 0, "bfloat16"),
    "sums in one part": BetweenMixersShape(1, 128, 256, 384, 256, "bfloat16"),
}
REAL = {  # of a decode step of configs/rat_1b.py and of configs/attention_1b.py
    "rat": BetweenMixersShape(1, 2048, 2048, 8192, 6656, "bfloat16"),
    "two rows": BetweenMixersShape(2, 2048, 2048, 8192, 6656, "float16"),
    "attention": BetweenMixersShape(1, 2048, 2048, 8192, 6144, "bfloat16"),
    "no next mixer": BetweenMixersShape(2, 2048, 2048, 8192, 0, "bfloat16"),
}


def draw(shape: BetweenMixersShape) -> tuple:
    """The arguments of `mosaic_gpu.run`."""
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def matrix(inputs, outputs):
        return (jax.random.normal(next(keys), (inputs, outputs)) * 2 / inputs**0.5).astype(shape.dtype)

    def scale():
        return 1 + 0.3 * jax.random.normal(next(keys), (shape.width,))

    inputs, width, hidden = shape.inputs, shape.width, shape.hidden
    mixed, x = (0.2 * jax.random.normal(next(keys), (shape.rows, n)).astype(shape.dtype) for n in (inputs, width))
    out, up, down = matrix(inputs, width), matrix(width, hidden), matrix(hidden, width)
    following = (scale(), matrix(width, shape.outputs)) if shape.outputs else None
    return mixed, x, scale(), out, up, down, following


def equations(arrays: tuple, multiply, norm, gelu) -> list:
    mixed, x, scale, out, up, down, following = arrays
    x = x + multiply(mixed, out)
    x = x + multiply(gelu(multiply(norm(x, scale), up)), down)
    return [x, multiply(norm(x, following[0]), following[1])] if following else [x]


def truth(arrays: tuple) -> list[np.ndarray]:
    return equations(
        jax.tree.map(lambda x: np.asarray(x.astype(jnp.float32), np.float64), arrays),
        np.matmul,
        lambda x, scale: x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + EPSILON) * scale,
        lambda x: x * 0.5 * (1 + scipy.special.erf(x / np.sqrt(2))),
    )


def plain(arrays: tuple) -> list[jax.Array]:
    """By XLA, rounded where the modules of the library round."""

    def norm(x, scale):
        x32 = x.astype(jnp.float32)
        return (x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=1, keepdims=True) + EPSILON) * scale[None]).astype(x.dtype)

    def gelu(x):
        return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)

    return equations(arrays, jnp.dot, norm, gelu)


def run(shape: BetweenMixersShape, arrays: tuple) -> tuple[jax.Array, ...]:
    return mosaic_gpu.run(shape, *arrays, epsilon=EPSILON)


def check_values(shape: BetweenMixersShape, run=run) -> None:
    arrays = draw(shape)
    for found, other, want in zip(run(shape, arrays), plain(arrays), truth(arrays), strict=True):
        assert (found.shape, found.dtype) == (want.shape, shape.dtype)
        found, other = (np.asarray(x.astype(jnp.float32), np.float64) for x in (found, other))
        error, of_plain = (np.linalg.norm(x - want) / np.linalg.norm(want) for x in (found, other))
        assert error <= LIMITS[shape.dtype]  # false for NaN too
        assert error <= 2 * of_plain


@pytest.fixture
def few_stages(monkeypatch):
    """A ring that goes round in a test's small matrices."""
    monkeypatch.setattr(mosaic_gpu, "STAGES", 2)


@pytest.mark.usefixtures("few_stages")
@pytest.mark.parametrize("name", SMALL)
def test_emulated_values_are_those_of_float64(name, monkeypatch):
    mosaic_emulator.install(monkeypatch, seed=list(SMALL).index(name), all_used=True)
    check_values(SMALL[name])


@pytest.mark.parametrize("name", REAL)
def test_the_kernel_lowers_for_cuda(name):
    shape = REAL[name]
    traced = jax.jit(lambda arrays: run(shape, arrays)).trace(jax.eval_shape(lambda: draw(shape)))
    sizes = (shape.width, shape.outputs) if shape.outputs else (shape.width,)
    assert [(x.shape, x.dtype) for x in traced.out_info] == [((shape.rows, size), shape.dtype) for size in sizes]
    assert "between_mixers_mosaic" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", REAL)
def test_real_sizes_fill_the_card_at_once(name):
    shape = REAL[name]
    assert mosaic_gpu_tiling.unsupported_reason(shape) is None
    assert mosaic_gpu_tiling.fills_card(shape)
    assert mosaic_gpu_tiling.splits(shape) == 4
    assert mosaic_gpu_tiling.programs(shape) == 128


@pytest.mark.parametrize(
    ("changes", "fills"),
    [
        ({"outputs": 5568}, False),
        ({"outputs": 5632}, True),
        ({"hidden": 5120}, False),
        ({"width": 1024}, True),  # in eight parts
        ({"width": 1024, "inputs": 1152}, False),  # in three
    ],
)
def test_two_thirds_of_the_multiprocessors_fill_the_card(changes, fills):
    assert mosaic_gpu_tiling.fills_card(dataclasses.replace(REAL["rat"], **changes)) == fills


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "dtype float32 is none of bfloat16, float16"),
        ({"rows": 3}, "3 rows are more than 2"),
        ({"inputs": 2112}, "inputs 2112 is no multiple of 128"),
        ({"width": 2112}, "width 2112 is no multiple of 128"),
        ({"hidden": 8256}, "hidden 8256 is no multiple of 128"),
        ({"outputs": 6660}, "outputs 6660 is no multiple of 64"),
        ({"hidden": 8576}, "134 programs, .* cannot all be on 132 multiprocessors"),
        ({"multiprocessors": 114}, "128 programs, .* cannot all be on 114 multiprocessors"),
        ({"inputs": 16384, "width": 8192, "hidden": 8192, "rows": 2}, "leave no room for 8 tiles"),
        ({"capability": (8, 9)}, r"needs a card of compute capability 9\.x, this one has 8\.9"),
        ({"capability": (10, 0)}, r"this one has 10\.0"),
    ],
)
def test_unsupported_sizes_say_why(changes, reason):
    assert re.search(reason, mosaic_gpu_tiling.unsupported_reason(dataclasses.replace(REAL["rat"], **changes)) or "")


@pytest.mark.parametrize("changes", [{"rows": 0}, {"hidden": 0}, {"outputs": -1}])
def test_sizes_must_be_positive(changes):
    with pytest.raises(ValueError, match="1 or more"):
        dataclasses.replace(REAL["rat"], **changes)


def hasty_wait(ring, step, wait=launch.Ring.wait, release=launch.Ring.release):
    tile = wait(ring, step)
    release(ring, step)
    return tile


def wait_for_all_but_one(semaphore, value, wait=mosaic_emulator.NAMES["plgpu"]["semaphore_wait"], **options):
    wait(semaphore, value - 1, **options)


def signals_elsewhere(semaphore, *arguments, signal=mosaic_emulator.NAMES["plgpu"]["semaphore_signal"], **options):
    if mosaic_emulator.running().axes["program"] != 2:
        signal(semaphore, *arguments, **options)


def nothing(*_, **options):
    pass


RING, PLGPU = launch.Ring, mosaic_emulator.NAMES["plgpu"]
MISTAKES = {  # what replaces what, and the fault
    "stages that are not released": ([(RING, "release", nothing)], "deadlock"),
    "stages that are released at once": ([(RING, "wait", hasty_wait), (RING, "release", nothing)], "race"),
    "programs that do not wait": ([(PLGPU, "semaphore_wait", nothing)], "race"),
    "programs that wait for too few": ([(PLGPU, "semaphore_wait", wait_for_all_but_one)], "race"),
    "programs that do not say that they are done": ([(PLGPU, "semaphore_signal", signals_elsewhere)], "deadlock"),
}


@pytest.mark.usefixtures("few_stages")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_emulator_finds(mistake, monkeypatch):
    changes, message = MISTAKES[mistake]
    mosaic_emulator.install(monkeypatch, seed=0)
    for place, name, instead in changes:
        (monkeypatch.setitem if isinstance(place, dict) else monkeypatch.setattr)(place, name, instead)
    shape = BetweenMixersShape(1, 512, 128, 512, 128, "bfloat16")
    with pytest.raises(Fault, match=message):
        run(shape, draw(shape))


@pytest.mark.gpu
@pytest.mark.parametrize("name", REAL)
def test_values_are_those_of_float64(hopper, name):
    check_values(REAL[name], jax.jit(run, static_argnums=0))
