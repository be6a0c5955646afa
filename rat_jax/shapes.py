"""The letters that name array axes throughout the project, and the array types.

| letter  | axis                                                                    |
|---------|-------------------------------------------------------------------------|
| B       | batch rows                                                              |
| b       | B, or 1 for what all rows have together                                 |
| T       | tokens of a row                                                         |
| S       | keys that a row attends to (cached and new), chunk summaries among them |
| L       | tokens of a chunk (`chunk_size`, or what an op cuts a row into)         |
| C       | chunks or chunk summaries; T = C L when L | T                           |
| N       | heads                                                                   |
| K       | key heads (`num_kv_heads`), each read by N / K heads                    |
| R       | heads that read one key head, N / K                                     |
| n       | N or K                                                                  |
| G       | groups: heads that share a query and a key in RAT                       |
| H       | channels of a head (`head_dim`)                                         |
| Hk, Hv  | the same of queries and keys, and of values, where these differ         |
| E       | features of a linear attention's query or key, 2 H                      |
| D       | channels of the residual stream (`width`)                               |
| F       | channels inside the MLP (`mlp_hidden`)                                  |
| V       | vocabulary                                                              |
| W       | earlier tokens that a window reaches (`window`)                         |
| O       | continuations of a context, such as the options of a question           |
| A       | devices, each with a row that its contexts begin with                   |
| P       | tokens with which all contexts of a batch begin                         |
| M       | tokens of a continuation                                                |
| U       | those of them that are read, M - 1                                      |
| c, *c   | channels of an op that knows no heads, on one axis or on several        |
| taps    | tokens that a convolution sees (`conv_size`)                            |
| earlier | earlier tokens that it sees, taps - 1                                   |
| *axes   | any number of axes                                                      |
| _       | one axis, of a size of its own wherever its type is used                |

The same letters are used in type annotations and docstrings, in lower case in einsum strings (next to others of that
line alone), and as the suffix of a variable (`hidden_BTD`) where a function has several cuts of one array. The test
suite checks annotations at every call.
"""

from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

__all__ = ["Array", "Bool", "Float", "Float32", "Int", "Shaped"]
