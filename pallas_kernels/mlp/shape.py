"""The sizes of an MLP's products, as far as kernels need them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class MlpShape:
    """Static sizes of one call on one device; see `rat_jax.ops.mlp` for the equation.

    Raises:
      ValueError: sizes that no implementation takes: the message names them.
    """

    tokens: int  # M, of all batch rows
    width: int  # K
    hidden: int  # N
    dtype: str = "bfloat16"  # of tokens, matrices and results, by name
    capability: tuple[int, int] | None = None  # compute capability of the CUDA device; None: unknown, or none

    def __post_init__(self):
        if min(self.tokens, self.width, self.hidden) < 1:
            raise ValueError(f"every size must be 1 or more, got {self}")
