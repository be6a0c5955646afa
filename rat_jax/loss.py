"""The next-token loss of a batch, without ever holding all its logits."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rat_jax.mesh import replicate, rows_per_device
from rat_jax.shapes import Array, Float, Float32, Int

# Logits that a device holds at a time. Large enough that products over a vocabulary of 32,000 run at full speed
# (2,048 tokens), small enough that their float32 copies (256 MiB each) fit beside a model.
_BLOCK_LOGITS = 1 << 26


class LossSums(NamedTuple):
    """Sums over target tokens; their quotient is the mean loss in nats."""

    loss: Float32[Array, ""]  # sum of weight * -log p(target)
    weight: Float32[Array, ""]  # sum of weights

    def mean(self) -> Float32[Array, ""]:
        """Loss a target token; 0 where there is none."""
        return self.loss / jnp.where(self.weight > 0, self.weight, 1.0)


def next_token_loss(
    hidden: Float[Array, "B T D"],
    embedding: Float32[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float32[Array, "B T"],
) -> LossSums:
    """Sums of w_t (logsumexp_v(h_t . E_v) - h_t . E_{y_t}) and of w_t.

    Logits are float32, of products in hidden's dtype, and are made for one block of tokens at a time. When
    differentiated, each block also computes its part of the two gradients, so that logits are neither kept nor made
    twice: the sum over blocks of the embedding's gradient is float32, its products are in hidden's dtype.

    Args:
      hidden: outputs h of the final norm, float32 or bfloat16.
      embedding: E, tied with the head.
      targets: y, ids in [0, V).
      weights: w, 0 where a target does not count; not differentiated.
    """
    num_blocks = -(-hidden.shape[1] // _block_tokens(*hidden.shape[:2], embedding.shape[0]))
    loss = _sum_loss(hidden, replicate(embedding.astype(jnp.float32)), targets, weights, num_blocks)
    return LossSums(loss, weights.astype(jnp.float32).sum())


def _block_tokens(batch_size: int, num_tokens: int, vocab_size: int) -> int:
    """Tokens of each row that a block holds."""
    return max(1, min(num_tokens, _BLOCK_LOGITS // (rows_per_device(batch_size) * vocab_size)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sum_loss(hidden: Array, embedding: Array, targets: Array, weights: Array, num_blocks: int) -> Array:
    def add_block(total, block):
        _, losses = _logits_and_losses(embedding, *block)
        return total + losses, None

    return jax.lax.scan(add_block, jnp.float32(0), _blocks(hidden, targets, weights, num_blocks))[0]


def _sum_loss_fwd(hidden, embedding, targets, weights, num_blocks):
    def add_block(carry, block):
        total, d_embedding = carry
        hidden_BTD, targets_BT, weights_BT = block
        logits, losses = _logits_and_losses(embedding, *block)
        is_target = targets_BT[..., None] == jnp.arange(logits.shape[-1])[None, None]
        d_logits = (jax.nn.softmax(logits) - is_target) * weights_BT[..., None]
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("btv,vd->btd", d_logits, embedding.astype(hidden.dtype))
        d_embedding += jnp.einsum("btv,btd->vd", d_logits, hidden_BTD, preferred_element_type=jnp.float32)
        return (total + losses, d_embedding), d_hidden

    start = (jnp.float32(0), jnp.zeros_like(embedding))
    (total, d_embedding), d_hidden = jax.lax.scan(add_block, start, _blocks(hidden, targets, weights, num_blocks))
    batch_size, num_tokens, width = hidden.shape
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(batch_size, -1, width)[:, :num_tokens]
    return total, (d_hidden, d_embedding)


def _sum_loss_bwd(num_blocks, gradients, d_total):
    d_hidden, d_embedding = gradients
    return (d_total * d_hidden).astype(d_hidden.dtype), d_total * d_embedding, None, None


_sum_loss.defvjp(_sum_loss_fwd, _sum_loss_bwd)


def _logits_and_losses(embedding: Array, hidden: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
    """Logits of one block [B, T, V] and the sum of its losses."""
    logits = jnp.einsum("btd,vd->btv", hidden, embedding.astype(hidden.dtype), preferred_element_type=jnp.float32)
    of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return logits, jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - of_target))


def _blocks(hidden: Array, targets: Array, weights: Array, num_blocks: int) -> tuple[Array, Array, Array]:
    """The arrays cut along T into blocks of equal length, the block first; padding has weight 0."""

    def cut(x):
        length = -(-x.shape[1] // num_blocks)
        padding = [(0, 0), (0, num_blocks * length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding)
        return jnp.moveaxis(x.reshape(x.shape[0], num_blocks, length, *x.shape[2:]), 1, 0)

    return cut(hidden), cut(targets), cut(weights.astype(jnp.float32))
