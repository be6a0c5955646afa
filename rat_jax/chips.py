"""What devices can do at most, by their kind in JAX: figures of data sheets, which no program reaches."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one device."""

    flops: float  # dense bfloat16 FLOP/s
    memory_bytes: float
    memory_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s that it can send to others of its kind, over all of its links together


_GB, _TB, _GIB = 1e9, 1e12, 2**30
# By the start of a kind; the first that fits. TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, whose bandwidths
# of the interconnect are halved where they count both directions. GPUs: NVIDIA's data sheets of each product ("H100
# Tensor Core GPU", "H200", "GH200", "A100"), dense and not sparse operations, half of NVLink's bandwidth, which counts
# both directions; the NVL's NVLink joins two cards, and the PCIe card is taken without its bridge.
_CHIPS = (
    ("NVIDIA H200", Chip(989e12, 141 * _GB, 4.8 * _TB, 450 * _GB)),
    ("NVIDIA H100 PCIe", Chip(756e12, 80 * _GB, 2.0 * _TB, 64 * _GB)),
    ("NVIDIA H100 NVL", Chip(835e12, 94 * _GB, 3.9 * _TB, 300 * _GB)),
    ("NVIDIA H100", Chip(989e12, 80 * _GB, 3.35 * _TB, 450 * _GB)),
    ("NVIDIA GH200", Chip(989e12, 96 * _GB, 4.0 * _TB, 450 * _GB)),
    ("NVIDIA A100-SXM4-40GB", Chip(312e12, 40 * _GB, 1.555 * _TB, 300 * _GB)),
    ("NVIDIA A100 80GB PCIe", Chip(312e12, 80 * _GB, 1.935 * _TB, 32 * _GB)),
    ("NVIDIA A100-PCIE-40GB", Chip(312e12, 40 * _GB, 1.555 * _TB, 32 * _GB)),
    ("NVIDIA A100", Chip(312e12, 80 * _GB, 2.039 * _TB, 300 * _GB)),
    ("TPU v4", Chip(275e12, 32 * _GIB, 1.2 * _TB, 300 * _GB)),
    ("TPU v5 lite", Chip(197e12, 16 * _GIB, 819 * _GB, 200 * _GB)),
    ("TPU v5e", Chip(197e12, 16 * _GIB, 819 * _GB, 200 * _GB)),
    ("TPU v5", Chip(459e12, 95 * _GIB, 2.765 * _TB, 600 * _GB)),  # v5p
    ("TPU v6 lite", Chip(918e12, 32 * _GIB, 1.6 * _TB, 400 * _GB)),
    ("TPU v6e", Chip(918e12, 32 * _GIB, 1.6 * _TB, 400 * _GB)),
)


def chip_of(device_kind: str) -> Chip | None:
    """The peaks of a kind of device; None where they are not known."""
    return next((chip for kind, chip in _CHIPS if device_kind.startswith(kind)), None)
