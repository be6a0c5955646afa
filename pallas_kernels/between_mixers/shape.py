"""The sizes of what stands between two mixers, as far as kernels need them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BetweenMixersShape:
    """Static sizes of one call on one device; see `rat_jax.ops.between_mixers` for the equations.

    Raises:
      ValueError: sizes that no implementation takes: the message names them.
    """

    rows: int  # B, of one token each
    inputs: int  # c, channels of what the mixer gives
    width: int  # D
    hidden: int  # F, of the MLP
    outputs: int  # channels of the next mixer's projection; 0: there is none
    dtype: str  # of rows, matrices and results, by name
    capability: tuple[int, int] | None = None  # compute capability of the CUDA device; None: unknown, or none
    multiprocessors: int | None = None  # of the device; None: unknown

    def __post_init__(self):
        if min(self.rows, self.inputs, self.width, self.hidden, self.outputs + 1) < 1:
            raise ValueError(f"every size must be 1 or more (outputs 0 or more), got {self}")
