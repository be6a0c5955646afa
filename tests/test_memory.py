"""What devices have free, and what arrays take."""

import pathlib
import types

import jax
import jax.numpy as jnp
import pytest

from rat_jax import memory


def free_bytes(platform: str, stats: dict | None) -> int | None:
    return memory.free_bytes(types.SimpleNamespace(platform=platform, memory_stats=lambda: stats))


def test_free_memory():
    assert free_bytes("gpu", {"bytes_limit": 100, "bytes_in_use": 30}) == 70
    assert free_bytes("gpu", None) is None
    assert free_bytes("gpu", {}) is None


@pytest.mark.skipif(not pathlib.Path("/proc/meminfo").is_file(), reason="Linux tells what is available, others not")
def test_free_memory_of_a_host_and_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP_LIMIT", tmp_path / "memory.max")
    assert 2**20 < free_bytes("cpu", None) < 2**50
    (tmp_path / "memory.max").write_text("max\n")
    assert 2**20 < free_bytes("cpu", None) < 2**50
    (tmp_path / "memory.max").write_text("4096\n")
    assert free_bytes("cpu", None) == 4096


def test_bytes_of_trees_and_their_unit():
    tree = {"a": jnp.zeros((3, 5), jnp.bfloat16), "b": jax.ShapeDtypeStruct((2**28,), jnp.float32)}
    assert memory.tree_bytes(tree) == 30 + 2**30
    assert memory.gib(3 * 2**29) == "1.5 GiB"


def test_errors_of_allocations_are_known():
    for text in ("RESOURCE_EXHAUSTED: Failed to allocate", "INTERNAL: Out of memory allocating 16 bytes."):
        assert memory.is_out_of_memory(jax.errors.JaxRuntimeError(text))
    assert not memory.is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: a bug"))
