"""What later tokens need to know of rows, as the kernels that continue them take and return it."""

from typing import NamedTuple

import jax


class State(NamedTuple):
    """The running pair after each row's last token, and the summaries of its completed chunks. C is the capacity.

    The summaries of a document are in neighbouring slots, from its `first_slots` on; what lies past C is lost.
    """

    key: jax.Array  # [B, N, H] float32, k~; not read where the next token begins a chunk
    value: jax.Array  # [B, N, H] float32, v~
    summary_key: jax.Array  # [B, C, N, H], rotated, in the dtype of `projected`
    summary_value: jax.Array  # [B, C, N, H]
