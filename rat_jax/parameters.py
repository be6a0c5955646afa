"""What a parameter says of itself: the names of its axes, and whether it is an operand of matrix products."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """Logical axes of a parameter of one layer; `rat_jax.sharding.MESH_AXES` maps them to the axes of a mesh."""

    axes: tuple[str | None, ...]  # None: an axis that is never cut
    matmul: bool = False  # an operand of matrix products: cast to the compute dtype once a step, or for all of decoding


MATRIX_IN = ParameterSpec(("width", "projected"), matmul=True)  # [D, any], of a projection out of the residual stream
MATRIX_OUT = ParameterSpec(("projected", "width"), matmul=True)  # [any, D], of a projection back into it
VECTOR = ParameterSpec((None,))  # norm scales, gate biases
