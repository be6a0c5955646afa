"""Which calls of softmax attention the Mosaic GPU kernels take, and each of them as a call of RAT's to slots."""

from pallas_kernels.attention.shape import AttentionShape
from pallas_kernels.launch.sizes import cdiv
from pallas_kernels.rat import mosaic_gpu_tiling
from pallas_kernels.rat.shape import RatShape

_LEAST_PROGRAMS = 1024  # that fill a card several times, one on each of its 132 multiprocessors


def unsupported_reason(shape: AttentionShape) -> str | None:
    """Why the kernels cannot run a call and what comes nearest; None where they can."""
    if not shape.own_keys:
        return "keys must be those of the queries' own tokens, not a cache's"
    return mosaic_gpu_tiling.unsupported_reason(slots_of(shape))


def heads_together(shape: AttentionShape) -> int:
    """Heads that a program goes through one after the other, so that it has a beginning and an end only once."""
    programs = shape.batch * shape.num_heads * cdiv(shape.tokens, mosaic_gpu_tiling.TILE)
    return next(n for n in (4, 2, 1) if shape.num_heads % n == 0 and (n == 1 or programs // n >= _LEAST_PROGRAMS))


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
