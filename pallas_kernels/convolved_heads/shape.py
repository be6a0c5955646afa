"""The sizes of one call of convolved heads, as every back end reads them."""

import dataclasses

LENGTH_EPSILON = 1e-6  # added to the squared lengths of queries and keys (flash-linear-attention)


@dataclasses.dataclass(frozen=True)
class ConvolvedHeadsShape:
    """Static sizes of the op on one device; see `pallas_kernels.convolved_heads.triton` for the equations.

    Raises:
      ValueError: sizes that no implementation takes: the message names them.
    """

    batch: int  # B
    tokens: int  # T
    num_heads: int  # N
    key_dim: int  # Hk
    value_dim: int  # Hv
    taps: int  # tokens that a convolution sees
    dtype: str  # of `projected`, by name
    segmented: bool  # tokens may begin documents, or be padding

    def __post_init__(self):
        if min(self.batch, self.tokens, self.num_heads, self.key_dim, self.value_dim, self.taps) < 1:
            raise ValueError(f"every size must be 1 or more, got {self}")

    @property
    def key_width(self) -> int:
        """Channels of all queries, and of all keys."""
        return self.num_heads * self.key_dim

    @property
    def value_width(self) -> int:
        """Channels of all values."""
        return self.num_heads * self.value_dim

    @property
    def width(self) -> int:
        """Channels of `projected`."""
        return 2 * self.key_width + self.value_width
