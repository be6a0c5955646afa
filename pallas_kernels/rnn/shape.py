"""The sizes of one call of the RNN mixing op, as every back end reads them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RnnShape:
    """Static sizes of the op on one device; see `pallas_kernels.rnn.triton` for the equations.

    Raises:
      ValueError: sizes that no implementation takes: the message names them.
    """

    batch: int  # B
    tokens: int  # T
    width: int  # D
    dtype: str  # of `projected`, by name
    segmented: bool  # tokens may begin documents, or be padding

    def __post_init__(self):
        if min(self.batch, self.tokens, self.width) < 1:
            raise ValueError(f"every size must be 1 or more, got {self}")
