"""A run with checkpoints, what may happen to them, and what comes back."""

import contextlib
import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rat_jax.checkpoints.workdir import Workdir
from tests.tiny_run import tiny_config

CONFIG = tiny_config("data", model__pattern=("rnn",), training__checkpoints_to_keep=3, training__num_steps=100)


def save(checkpoints, step, params):
    """Starts to save a step of a run whose optimizer's state is the step."""
    checkpoints.save(step, params, {"count": jnp.int32(step)}, {"next_batch": step, "fingerprint": {"seed": 0}})


def new_run(folder):
    workdir = Workdir(folder)
    workdir.mark(CONFIG, None)
    return workdir


def times(model, factor):
    return jax.tree.map(lambda x: x * factor, nnx.state(model))


def steps(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def tree(folder):
    """Every file of a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill(*arguments):
    raise KeyboardInterrupt


def forget_saves(run):
    """Makes run.json one of code that did not note what was saved."""
    values = json.loads((run / "run.json").read_text())
    del values["saved_step"]
    (run / "run.json").write_text(json.dumps(values))


@contextlib.contextmanager
def files_up_to(num_bytes):
    """Within the block, this process can write no larger file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def largest_file(run, step):
    files = (run / "checkpoints" / str(step) / "params").rglob("*")
    return max((file for file in files if file.is_file()), key=lambda file: file.stat().st_size)


def flip_bit(run):
    content = bytearray(largest_file(run, 30).read_bytes())
    content[len(content) // 3] ^= 4
    largest_file(run, 30).write_bytes(content)


def cut_short(run):
    content = largest_file(run, 30).read_bytes()
    largest_file(run, 30).write_bytes(content[: len(content) // 2])


def remove_file(run):
    largest_file(run, 30).unlink()


def remove_optimizer(run):
    shutil.rmtree(run / "checkpoints/30/optimizer")


def remove_manifest(run):
    (run / "checkpoints/30/manifest.json").unlink()


def tear_manifest(run):
    manifest = run / "checkpoints/30/manifest.json"
    manifest.write_text(manifest.read_text()[:200])


def empty_folder(run):
    shutil.rmtree(run / "checkpoints/30")
    (run / "checkpoints/30").mkdir()


DAMAGES = [flip_bit, cut_short, remove_file, remove_optimizer, remove_manifest, tear_manifest, empty_folder]


def assert_is_multiple(loaded, model, factor):
    for a, b in zip(jax.tree.leaves(nnx.state(loaded)), jax.tree.leaves(times(model, factor)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
