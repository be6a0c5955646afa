"""The sizes of one call of softmax attention, as far as kernels need them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Static sizes of causal attention on one device."""

    batch: int  # B
    tokens: int  # T
    num_heads: int  # N
    key_heads: int  # K; head n reads key head n // (N / K)
    head_dim: int  # H
    dtype: str  # of queries, keys and values, by name
    window: int | None = None  # earlier tokens that a query sees besides itself; None: all
    own_keys: bool = True  # keys are those of the queries' own tokens, in the same order; no cache
    whole_rows: bool = True  # own keys of rows that are one document each, without padding
    capability: tuple[int, int] | None = None  # compute capability of the CUDA device; None: unknown, or none
