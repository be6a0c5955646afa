"""Softmax attention where devices hold parts of rows (`rat_jax.ops.context`).

A part's own keys are read as whole rows are. Keys of earlier parts come from where they are: all of them, or those that
a window reaches, which the part's first queries alone see. Both softmaxes join by their log-sum-exps. With the joined
output and log-sum-exp the backward pass of whole rows gives the share of the part's own keys.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.shape import AttentionShape
from rat_jax.ops import attention_xla, balanced_parts, context, dispatch, document_attention
from rat_jax.ops.attention_kernels import Attend
from rat_jax.ops.attention_types import KeyInfo
from rat_jax.ops.block_attention import Implementation
from rat_jax.ops.document_attention import Attended
from rat_jax.shapes import Array, Float


class Keys(NamedTuple):
    """Keys and values of tokens."""

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]


@dataclasses.dataclass(frozen=True)
class AttendPart(dispatch.Kernel):
    """Of query, key, value and what is known of the tokens of a part: the output and the log-sum-exp."""

    implementation: Implementation
    shape: AttentionShape  # of the part
    window: int | None  # earlier tokens that a query sees, of its own part or of others; None: all
    replicated: ClassVar[tuple[int, ...]] = ()
    num_differentiated: ClassVar[int] = 3
    saved_results: ClassVar[tuple[int, ...]] = (0, 1)
    without_gradient: ClassVar[tuple[int, ...]] = (1,)

    def forward(self, query: Array, key: Array, value: Array, info: KeyInfo) -> tuple[tuple[Array, Array], None]:
        out, sums = self._attend_own(query, key, value, info)
        reach, keys, places = self._reach, self._earlier(Keys(key, value)), self._places(info)
        if self.window is None:
            beyond = balanced_parts.attend(self.implementation, query, *keys, *places)
        else:
            beyond = document_attention.attend(query[:, :reach], *keys, *places, self.window)
        own = Attended(out[:, :reach].astype(jnp.float32), sums[:, :reach].transpose(0, 2, 1))
        joined = document_attention.join(own, beyond)
        first = joined.out.astype(out.dtype), joined.log_sum_exp.transpose(0, 2, 1)
        return (_with_first(out, first[0]), _with_first(sums, first[1])), None

    def plain(self, query: Array, key: Array, value: Array, info: KeyInfo) -> tuple[Array, Array]:
        return tuple(attend(query, key, value, info, self.window))

    def backward(self, arguments, saved, residuals, d_results) -> tuple[Array, Array, Array]:
        *arrays, info = arguments
        (query, *keys), (out, sums), (d_out, _) = arrays, saved, d_results
        reach = self._reach
        earlier, pull_back = jax.vjp(self._earlier, Keys(*keys))
        delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)
        rows = (sums[:, :reach].transpose(0, 2, 1), delta[:, :reach].transpose(0, 2, 1), d_out[:, :reach])
        places = self._places(info)
        if self.window is None:
            found = balanced_parts.gradients(self.implementation, query, *earlier, *places, *rows)
        else:
            found = document_attention.gradients(query[:, :reach], *earlier, *places, *rows, self.window)
        d_keys = pull_back(Keys(found.d_key.astype(earlier.key.dtype), found.d_value.astype(earlier.value.dtype)))[0]
        if self.implementation == "xla":  # which has no window, so that all queries reach beyond the part
            d_query, *d_own = document_attention.gradients(*arrays, info, info, *rows)
        else:
            d_query, *d_own = self._own.backward((*arrays, self._documents(info)), saved, residuals, d_results)
        d_query = _with_first(d_query, d_query[:, :reach] + found.d_query.astype(d_query.dtype))
        return tuple(
            (own + other).astype(x.dtype) for own, other, x in zip((d_query, *d_own), (0, *d_keys), arrays, strict=True)
        )

    def _attend_own(self, query: Array, key: Array, value: Array, info: KeyInfo) -> tuple[Array, Array]:
        if self.implementation == "xla":
            return tuple(attention_xla.attend(query, key, value, info, info, self.window, aligned=True))
        return self._own.forward(query, key, value, self._documents(info))[0]

    @property
    def _own(self) -> Attend:
        return Attend(self.implementation, self.shape)

    @property
    def _reach(self) -> int:
        """Queries, the first of the part, that see keys of earlier parts."""
        return self.shape.tokens if self.window is None else min(self.window, self.shape.tokens)

    def _documents(self, info: KeyInfo) -> KeyInfo | None:
        return None if self.shape.whole_rows else info

    def _earlier(self, own: Keys) -> Keys:
        return _seen_of_others(own, self.window)

    def _places(self, info: KeyInfo) -> tuple[KeyInfo, KeyInfo]:
        """Of the queries that see keys of earlier parts, and of the keys of `_earlier`."""
        return jax.tree.map(lambda x: x[:, : self._reach], info), _seen_of_others(info, self.window)


def attend(query: Array, key: Array, value: Array, info: KeyInfo, window: int | None):
    """Self-attention of a part in plain XLA: to keys of all parts, or to its own and those that a window reaches."""
    own = (key, value, info)
    seen = _seen_of_others(own, window)
    if window is not None:
        seen = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), seen, own)
    *keys, key_info = seen
    info, key_info = (dataclasses.replace(x, contiguous=False) for x in (info, key_info))
    return attention_xla.attend(query, *keys, info, key_info, window, aligned=window is not None)


def _with_first(x: Array, first: Array) -> Array:
    """With other first tokens. Not `x.at`: where these are all, XLA's partitioner crashes (jax 0.11.2, on GPUs)."""
    return jax.lax.dynamic_update_slice_in_dim(x, first, 0, axis=1)


def _seen_of_others(own: Any, window: int | None) -> Any:
    """Of keys, values or what is known of them: of all parts, or the `window` tokens before the part."""
    if window is None:
        return context.gather(own)
    return jax.tree.map(lambda x: context.tokens_before(x, window), own)
