"""The letters that name array axes throughout the project, and the array types.

| letter | axis                                            |
|--------|-------------------------------------------------|
| B      | batch rows                                      |
| T      | tokens of a row                                 |
| S      | keys that a row attends to (cached and new)     |
| L      | tokens of a chunk (`chunk_size`)                |
| C      | chunks or chunk summaries; T = C L when L | T   |
| N      | heads                                           |
| G      | groups: heads that share a query or a key       |
| H      | channels of a head (`head_dim`)                 |
| D      | channels of the residual stream (`width`), N H  |
| F      | channels inside the MLP (`mlp_width`)           |
| V      | vocabulary                                      |
| W      | earlier tokens that a window reaches (`window`) |

The same letters stand in type annotations, einsum strings, variable suffixes (`q_BTNH`) and tests.
"""

from jaxtyping import Array, Bool, Float, Float32, Int

__all__ = ["Array", "Bool", "Float", "Float32", "Int"]
