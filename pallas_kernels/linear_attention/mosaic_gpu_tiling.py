"""The sizes of one call of linear attention, its blocks, and which calls the Mosaic GPU kernels take."""

import dataclasses
from typing import Literal

from pallas_kernels.launch.arithmetic import cdiv
from pallas_kernels.launch.mosaic_gpu import ROWS
from pallas_kernels.linear_attention import triton_tiling as linear_attention_problem

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128)
TILES = 4  # of ROWS tokens, between which scores are made: a block, for which a state is kept in memory
BLOCK = TILES * ROWS
MULTIPROCESSORS = 132  # of the largest Hopper cards; smaller ones run the programs that are left afterwards


@dataclasses.dataclass(frozen=True)
class LinearProblem:
    """Static sizes of the op; see `pallas_kernels.linear_attention.mosaic_gpu` for the equations."""

    batch: int  # B
    tokens: int  # T
    num_heads: int  # N
    key_heads: int  # K; head n reads key head n // (N / K)
    head_dim: int  # H
    dtype: Literal["bfloat16", "float16"]
    feature_map: Literal["softmax", "relu"]
    key_lag: int = 0  # tokens after which a key and its value are seen: a multiple of ROWS, or one more

    @property
    def shared(self) -> int:
        """Query heads of a key head."""
        return self.num_heads // self.key_heads

    @property
    def softmax(self) -> bool:
        return self.feature_map == "softmax"

    @property
    def offset(self) -> int:
        """Key s stands beside query s + offset: the key_lag in whole tiles, which begin where copies may."""
        return self.key_lag // ROWS * ROWS

    @property
    def strict(self) -> bool:
        """Whether the query beside a key is the last that does not see it, and not the first that does."""
        return self.key_lag > self.offset

    @property
    def blocks(self) -> int:
        """C: blocks of a row of queries."""
        return cdiv(self.tokens, BLOCK)

    @property
    def span(self) -> int:
        """Blocks of a segment; segments are summed up side by side, the blocks of one after the other."""
        rows = self.batch * self.key_heads
        return cdiv(self.blocks, min(self.blocks, max(1, MULTIPROCESSORS // rows)))

    @property
    def segments(self) -> int:
        return cdiv(self.blocks, self.span)


def refusal(
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    dtype: object,
    *,
    initial_shape: tuple[int, ...] | None = None,
) -> str | None:
    """Why query [B, T, N, H], key and value [B, T, K, H] cannot run here and the nearest that can; None if they can."""
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    if name not in DTYPES:
        return f"dtype {name} is none of {', '.join(DTYPES)}; the Triton kernels take float32"
    if initial_shape is not None:
        return "an initial state is not taken; the Triton kernels take one"
    reason = linear_attention_problem.refusal(query_shape, key_shape, dtype)  # what no kernel can run
    head_dim = query_shape[-1]
    if reason is None and head_dim not in HEAD_DIMS:
        nearest = min(HEAD_DIMS, key=lambda size: abs(size - head_dim))
        return f"head_dim {head_dim} is none of {', '.join(map(str, HEAD_DIMS))}; the nearest is {nearest}"
    return reason
