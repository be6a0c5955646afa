"""The sizes of a normed product, as far as kernels need them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class NormedProductShape:
    """Static sizes of one call on one device; see `rat_jax.ops.normed_product` for the equation.

    Raises:
      ValueError: sizes that no implementation takes: the message names them.
    """

    rows: int  # M, of all batch rows and tokens
    inputs: int  # D
    outputs: int  # c
    dtype: str  # of rows, matrix and result, by name
    gelu: bool = False  # whether one follows
    capability: tuple[int, int] | None = None  # compute capability of the CUDA device; None: unknown, or none

    def __post_init__(self):
        if min(self.rows, self.inputs, self.outputs) < 1:
            raise ValueError(f"every size must be 1 or more, got {self}")
