"""Sizes of the MLP's products."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class MlpShape:
    """Tokens M, width K and hidden size N."""

    tokens: int
    width: int
    hidden: int
    dtype: str = "bfloat16"
