"""What the emulator of Mosaic GPU kernels makes of programs that wait for each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.launch import mosaic_gpu as launch
from tests.pallas_kernels import mosaic_emulator, mosaic_gpu_meeting
from tests.pallas_kernels.mosaic_machine import Fault

PLGPU, PL = (mosaic_emulator.NAMES[name] for name in ("plgpu", "pl"))


def parts(programs: int) -> jax.Array:
    """Small whole numbers, of which sums are exact."""
    side = mosaic_gpu_meeting.SIDE
    return jax.random.randint(jax.random.key(0), (programs, side, side), -8, 8).astype(jnp.bfloat16)


@pytest.mark.parametrize("several", [False, True], ids=["one", "array"])
@pytest.mark.parametrize("seed", range(6))
def test_programs_meet_at_a_semaphore(seed, several, monkeypatch):
    mosaic_emulator.install(monkeypatch, seed, all_used=True)
    x = parts(3 + seed % 2)
    middle, out = mosaic_gpu_meeting.meet(x, several=several)
    want = np.asarray(x, np.float64) + 1
    np.testing.assert_array_equal(np.asarray(middle, np.float64), want)
    np.testing.assert_array_equal(np.asarray(out, np.float64), want.sum(axis=0) + want)


@pytest.mark.parametrize("several", [False, True], ids=["one", "array"])
def test_the_kernel_lowers_for_cuda(several):
    traced = jax.jit(lambda x: mosaic_gpu_meeting.meet(x, several=several)).trace(jax.eval_shape(lambda: parts(3)))
    assert "meeting_mosaic" in traced.lower(lowering_platforms=("cuda",)).as_text()


def nothing(*_, **options):
    pass


def signal_of_all_but_one(semaphore, *arguments, signal=PLGPU["semaphore_signal"], **options):
    if mosaic_emulator.running().axes["program"] != 1:
        signal(semaphore, *arguments, **options)


def hasty_signal(*arguments, signal=PLGPU["semaphore_signal"], wait_for_copies=PLGPU["wait_smem_to_gmem"], **options):
    signal(*arguments, **options)
    wait_for_copies(0)


def wait_until_read(left, wait=PLGPU["wait_smem_to_gmem"]):
    wait(left, wait_read_only=True)


def late_wait_for_too_few(semaphore, value, wait=PLGPU["semaphore_wait"], **options):
    mosaic_emulator.running().step(lambda: semaphore.only.total == value)
    wait(semaphore, value - 1, **options)


def greedy_wait(semaphore, value, wait=PLGPU["semaphore_wait"], **options):
    wait(semaphore, value, decrement=True)


def store_of_registers(value, tile, target):
    target[...] = value.astype(tile.dtype)


def copy_of_registers(source, target, barrier, copy=PLGPU["copy_gmem_to_smem"]):
    assert source[...].shape == target.shape
    copy(source, target, barrier)


def semaphore_in_branch(kind, get_global=PL["get_global"], when=PL["when"]):
    found = []
    when(True)(lambda: found.append(get_global(kind)))
    return found[0]


MISTAKES = {  # what replaces what, and the fault
    "no wait": ([(PLGPU, "semaphore_wait", nothing)], "race: middle"),
    "no semaphore": (
        [(PL, "get_global", nothing), (PLGPU, "semaphore_wait", nothing), (PLGPU, "semaphore_signal", nothing)],
        "race: middle",
    ),
    "no signal": (
        [(PLGPU, "semaphore_signal", signal_of_all_but_one)],
        "deadlock(.|\n)* waits for 4 of semaphore 0, which is 3 at",
    ),
    "signals of copies under way": (
        [(PLGPU, "semaphore_signal", hasty_signal), (PLGPU, "wait_smem_to_gmem", nothing)],
        "race: middle",
    ),
    "signals of copies that are read": ([(PLGPU, "wait_smem_to_gmem", wait_until_read)], "race: middle"),
    "waits for too few": ([(PLGPU, "semaphore_wait", late_wait_for_too_few)], "race: middle .* is read by load"),
    "loads that nothing orders": (
        [(PLGPU, "semaphore_wait", nothing), (PLGPU, "copy_gmem_to_smem", copy_of_registers)],
        "race: middle .* is read by warpgroup",
    ),
    "waits that take signals from others": (
        [(PLGPU, "semaphore_wait", greedy_wait)],
        "deadlock(.|\n)* waits for 4 of semaphore 0, which is 0 at",
    ),
    "stores that copies need not see": (
        [(mosaic_gpu_meeting, "_store", store_of_registers)],
        "middle .*\n  which need not see what is stored by",
    ),
    "semaphores in branches": ([(PL, "get_global", semaphore_in_branch)], "in a branch"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_emulator_finds(mistake, monkeypatch):
    changes, message = MISTAKES[mistake]
    for place, name, instead in changes:
        (monkeypatch.setitem if isinstance(place, dict) else monkeypatch.setattr)(place, name, instead)
    for seed in range(5):
        mosaic_emulator.install(monkeypatch, seed)
        with pytest.raises(Fault, match=message):
            mosaic_gpu_meeting.meet(parts(4))


def test_semaphores_of_the_grid_are_no_scratch(monkeypatch):
    mosaic_emulator.install(monkeypatch, seed=0)
    result = jax.ShapeDtypeStruct((8,), jnp.float32)
    semaphore = plgpu.SemaphoreType.REGULAR
    kernel = launch.kernel(nothing, name="scratch", programs=2, out_type=result, scratch_types=(semaphore,))
    with pytest.raises(Fault, match="scratch is a program's own"):
        kernel()
