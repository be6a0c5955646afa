"""Which calls of softmax attention the Mosaic GPU kernels take, and each of them as a call of RAT's to slots."""

from pallas_kernels.attention.shape import AttentionShape
from pallas_kernels.rat import mosaic_gpu_tiling
from pallas_kernels.rat.shape import RatShape


def unsupported_reason(shape: AttentionShape) -> str | None:
    """Why the kernels cannot run a call and what comes nearest; None where they can."""
    if not shape.own_keys:
        return "keys must be those of the queries' own tokens, not a cache's"
    return mosaic_gpu_tiling.unsupported_reason(slots_of(shape))


def slots_of(shape: AttentionShape) -> RatShape:
    """Chunks are tokens, and heads share no query."""
    return RatShape(
        batch=shape.batch,
        tokens=shape.tokens,
        num_heads=shape.num_heads,
        num_groups=shape.num_heads,
        head_dim=shape.head_dim,
        chunk_size=1,
        dtype=shape.dtype,
        rope_base=None,
        segmented=True,
        capability=shape.capability,
    )
