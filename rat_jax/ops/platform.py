"""Which platform and devices a program is traced for; what is traced may still be lowered for another."""

import jax


def expected_platform() -> str:
    """Of the mesh in use, otherwise of jax's default devices: "cpu", "gpu", "cuda" or "tpu"."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def expected_capability() -> tuple[int, int] | None:
    """CUDA compute capability of the devices that are traced for; None where it is not known, or they have none."""
    device = jax.devices()[0]
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None and mesh.abstract_device.device_kind != device.device_kind:
        return None
    capability = getattr(device, "compute_capability", None)
    return None if capability is None else tuple(int(number) for number in capability.split("."))
