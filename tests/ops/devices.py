"""The device that programs of a test are traced for."""

import pytest

from rat_jax.ops import dispatch, platform


def trace_for(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    capability: tuple[int, int] | None = (9, 0),
    multiprocessors: int | None = 132,
) -> None:
    """Lets programs be traced for a platform; the others are a GPU's."""
    is_gpu = name == "gpu"
    monkeypatch.setattr(platform, "expected_platform", lambda: name)
    monkeypatch.setattr(platform, "expected_capability", lambda: capability if is_gpu else None)
    monkeypatch.setattr(platform, "expected_multiprocessors", lambda: multiprocessors if is_gpu else None)


def take_cpu_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the CPU, or an emulator on it, run what Hopper GPUs run by Mosaic GPU."""
    monkeypatch.setitem(dispatch._PLATFORMS, "mosaic_gpu", "cpu")
    monkeypatch.setattr(platform, "expected_capability", lambda: (9, 0))
    monkeypatch.setattr(platform, "expected_multiprocessors", lambda: 132)
