"""Which platform and devices a program is traced for; what is traced may still be lowered for another."""

import jax


def expected_platform() -> str:
    """Of the mesh in use, otherwise of jax's default devices: "cpu", "gpu", "cuda" or "tpu"."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def expected_capability() -> tuple[int, int] | None:
    """CUDA compute capability of the devices that are traced for; None where it is not known, or they have none."""
    capability = getattr(_expected_device(), "compute_capability", None)
    return None if capability is None else tuple(int(number) for number in capability.split("."))


def expected_multiprocessors() -> int | None:
    """Multiprocessors of each of the GPUs that are traced for; None where it is not known, or they are none."""
    device = _expected_device()
    return getattr(device, "core_count", None) if device is not None and device.platform == "gpu" else None


def _expected_device() -> jax.Device | None:
    """A device like those that are traced for; None where there is none."""
    device = jax.devices()[0]
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None and mesh.abstract_device.device_kind != device.device_kind:
        return None
    return device
