"""The sizes of one call of the residual norm, as every back end reads them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ResidualNormShape:
    """Static sizes of the op on one device; see `pallas_kernels.residual_norm.triton` for the equations.

    Raises:
      ValueError: sizes that no implementation takes: the message names them.
    """

    tokens: int  # of all rows
    width: int  # D
    dtype: str  # of the tokens, by name
    epsilon: float

    def __post_init__(self):
        if min(self.tokens, self.width) < 1 or not self.epsilon > 0:
            raise ValueError(f"every size must be 1 or more and epsilon above 0, got {self}")
