"""The sizes of one call of the gated delta rule, as every back end reads them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class GatedDeltaRuleShape:
    """Static sizes of the op on one device; see `pallas_kernels.gated_delta_rule.triton` for the equations.

    Raises:
      ValueError: sizes that no implementation takes: the message names them.
    """

    batch: int  # B
    tokens: int  # T
    num_heads: int  # N
    key_dim: int  # Hk
    value_dim: int  # Hv
    chunk_size: int  # L, tokens of a chunk
    dtype: str  # of queries, keys and values, by name
    segmented: bool = False  # tokens may begin documents
    continued: bool = False  # rows continue from a state
    capability: tuple[int, int] | None = None  # compute capability of the CUDA device; None: unknown, or none

    def __post_init__(self):
        sizes = self.batch, self.tokens, self.num_heads, self.key_dim, self.value_dim, self.chunk_size
        if min(sizes) < 1:
            raise ValueError(f"every size must be 1 or more, got {self}")

    @property
    def is_step(self) -> bool:
        """One token of rows that continue from a state: one update of it, without chunks."""
        return self.continued and self.tokens == 1
