"""The sizes of one call of linear attention, as every back end and the plain XLA implementation read them."""

import dataclasses
from typing import Literal

FeatureMap = Literal["softmax", "relu"]


@dataclasses.dataclass(frozen=True)
class LinearAttentionShape:
    """Static sizes of the op on one device; see `pallas_kernels.linear_attention.triton` for the equations.

    Raises:
      ValueError: sizes that no implementation takes: the message names them.
    """

    batch: int  # B
    tokens: int  # T
    num_heads: int  # N
    key_heads: int  # K; head n reads key head n // (N / K)
    head_dim: int  # H
    dtype: str  # of queries, keys and values, by name
    feature_map: FeatureMap
    segmented: bool = False  # documents are packed
    key_lag: int = 0  # query t sees keys s <= t - key_lag
    initial_rows: int = 0  # of the initial state: 0 (there is none), 1 or B
    initial_heads: int = 0  # 0, K or N
    continued: bool = False  # rows continue from a state
    capability: tuple[int, int] | None = None  # compute capability of the CUDA device; None: unknown, or none

    def __post_init__(self):
        if min(self.batch, self.tokens, self.num_heads, self.key_heads, self.head_dim) < 1:
            raise ValueError(f"every size must be 1 or more, got {self}")
        if self.num_heads % self.key_heads:
            raise ValueError(f"query heads must be a multiple of key heads, got {self.num_heads} and {self.key_heads}")
        if self.feature_map not in ("softmax", "relu"):
            raise ValueError(f"feature_map must be 'softmax' or 'relu', got {self.feature_map!r}")
        if self.key_lag < 0:
            raise ValueError(f"key_lag must be 0 or more, got {self.key_lag}")

    @property
    def heads_per_key(self) -> int:
        """Query heads that read one key head."""
        return self.num_heads // self.key_heads

    @property
    def softmax(self) -> bool:
        return self.feature_map == "softmax"
