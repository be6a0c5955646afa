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
# By the start of a kind; the first that fits. Dense operations, not sparse ones; of links what they carry one way, half
# of what data sheets count. Where each figure is from:
# * TPU: the tables of docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, as they stood in 2026. They say 32 GiB (v4), 95
#   GiB (v5p; the compiler allows 95.74), 16 GB and 32 GB (v5e, v6e: of GiB the compiler allows 15.75 and 31.25), and
#   400, 1200 and 800 GB/s of interconnect in both directions (v5e, v5p, v6e). Earlier states of these pages have 1640
#   GB/s of memory and 3584 Gbit/s of links for v6e. v4's links are not there: six of 50 GB/s, arXiv 2304.01433.
# * A100, H100 SXM and H200 SXM: NVIDIA's data sheets of these products, as others cite them. NVLink of 600 and
#   900 GB/s both ways; without it PCIe 4.0 of 64.
# * H100 PCIe and NVL, H200 NVL, GH200: what their data sheets say as remembered, not read again. The H100 PCIe is taken
#   without its bridge, at PCIe 5.0's 128 GB/s both ways; bridges of the NVLs join two cards (H200: or four).
_CHIPS = (
    ("NVIDIA H200 NVL", Chip(835e12, 141 * _GB, 4.8 * _TB, 450 * _GB)),
    ("NVIDIA H200", Chip(989e12, 141 * _GB, 4.8 * _TB, 450 * _GB)),
    ("NVIDIA H100 PCIe", Chip(756e12, 80 * _GB, 2.0 * _TB, 64 * _GB)),
    ("NVIDIA H100 NVL", Chip(835e12, 94 * _GB, 3.9 * _TB, 300 * _GB)),
    ("NVIDIA H100", Chip(989e12, 80 * _GB, 3.35 * _TB, 450 * _GB)),
    ("NVIDIA GH200 144G HBM3e", Chip(989e12, 144 * _GB, 4.9 * _TB, 450 * _GB)),
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
