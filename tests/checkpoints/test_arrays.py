"""How arrays lie on disk, and what is told of a write that fails."""

import asyncio
import gc
import math

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from rat_jax.checkpoints.arrays import ArrayWriter
from rat_jax.checkpoints.workdir import CheckpointError
from tests.checkpoints.saved_run import files_up_to

TASKS = """
async def write_fragment():
    raise ValueError("no space left")
async def first_and_others():
    tasks = [asyncio.get_running_loop().create_task(write_fragment()) for _ in range(3)]
    await tasks[0]
"""


def abandon_writes(file):
    """Runs three writes of the code of `file` of which the first to fail ends the others' loop unasked."""
    names = {"asyncio": asyncio}
    exec(compile(TASKS, file, "exec"), names)
    with pytest.raises(ValueError, match="no space left"):
        asyncio.run(names["first_and_others"]())
    gc.collect()


@pytest.fixture
def failed_save(tmp_path):
    writer = ArrayWriter()
    with files_up_to(2000), pytest.raises(CheckpointError, match="File too large"):
        writer.start(tmp_path / "40", {"params": {f"x{i}": jnp.full((50, 50), i) for i in range(20)}})
        writer.wait(tmp_path / "40")
    writer.close()


@pytest.mark.usefixtures("failed_save")
def test_other_writes_that_fail_too_are_not_told(caplog):
    abandon_writes("/site-packages/orbax/checkpoint/serialization.py")
    assert caplog.messages == []
    abandon_writes("/site-packages/of_another/serialization.py")
    assert any(message.startswith("Task exception was never retrieved") for message in caplog.messages)


def test_large_arrays_are_stored_in_parts_that_threads_read(tmp_path):
    writer = ArrayWriter()
    stacked = jnp.zeros((5, 1 << 22))  # 80 MiB
    writer.start(tmp_path / "40", {"params": {"stacked": stacked, "small": jnp.ones((3, 4))}})
    writer.wait(tmp_path / "40")
    writer.close()
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(tmp_path / "40" / "params").item_metadata
    assert math.prod(stored["stacked"].storage.chunk_shape) * 4 <= 1 << 26
    assert stored["small"].storage.chunk_shape == (3, 4)
