"""The sizes of one call of the normed sum, as every back end reads them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class NormedSumShape:
    """Static sizes of the op on one device; see `pallas_kernels.normed_sum.triton` for the equations.

    Raises:
      ValueError: sizes that no implementation takes: the message names them.
    """

    tokens: int  # of all rows
    heads: int  # N
    head_dim: int  # H
    dtype: str  # of both arrays and of the result, by name
    epsilon: float

    def __post_init__(self):
        if min(self.tokens, self.heads, self.head_dim) < 1 or not self.epsilon > 0:
            raise ValueError(f"every size must be 1 or more and epsilon above 0, got {self}")
