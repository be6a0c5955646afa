"""The next-token loss of a batch and of each of its tokens, without ever holding all its logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rat_jax.mesh import BATCH_AXES, CONTEXT_AXIS, TENSOR_AXIS, num_parts_here, replicate, rows_per_device
from rat_jax.ops import cut
from rat_jax.shapes import Array, Bool, Float, Float32, Int

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


class TokenScores(NamedTuple):
    """What a model says of each target."""

    log_probs: Float32[Array, "B T"]  # log p(target), in nats
    greedy: Bool[Array, "B T"]  # whether the target has the largest logit, of equal ones the lowest id


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
    embedding = embedding.astype(jnp.float32)
    if cut.is_cut():
        loss = cut.run(_sum_of_parts, ("BT", "V", "BT", "BT"), "", hidden, embedding, targets, weights)
    else:
        loss = _sum_loss(hidden, replicate(embedding), targets, weights)
    return LossSums(loss, weights.astype(jnp.float32).sum())


def _sum_of_parts(hidden: Array, embedding: Array, targets: Array, weights: Array) -> Array:
    return jax.lax.psum(_sum_loss(hidden, embedding, targets, weights), (*BATCH_AXES, CONTEXT_AXIS))


def position_losses(
    hidden: Float[Array, "B T D"],
    embedding: Float32[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float32[Array, "B T"],
) -> Float32[Array, " T"]:
    """Sums over the rows of w_t (logsumexp_v(h_t . E_v) - h_t . E_{y_t}), one for each position t.

    The arguments, and how logits are made, are those of `next_token_loss`; a derivative of this would keep all logits.
    """
    if cut.is_cut():
        return cut.run(_position_losses_of_parts, ("BT", "V", "BT", "BT"), "T", hidden, embedding, targets, weights)
    return _position_losses(hidden, replicate(embedding), targets, weights)


def _position_losses_of_parts(hidden: Array, embedding: Array, targets: Array, weights: Array) -> Array:
    return jax.lax.psum(_position_losses(hidden, embedding, targets, weights), BATCH_AXES)


def _position_losses(hidden: Array, embedding: Array, targets: Array, weights: Array) -> Array:
    operand = embedding.astype(hidden.dtype)

    def block_losses(block):
        return _logits_and_losses(operand, *block)[-1].sum(axis=0)

    losses = jax.lax.map(block_losses, _blocks(hidden, targets, weights, embedding.shape[0]))
    return losses.reshape(-1)[: hidden.shape[1]]


def token_scores(
    hidden: Float[Array, "B T D"], embedding: Float32[Array, "V D"], targets: Int[Array, "B T"]
) -> TokenScores:
    """log p(y_t) = h_t . E_{y_t} - logsumexp_v(h_t . E_v), and whether y_t = argmax_v(h_t . E_v), of every token.

    The arguments, and how logits are made, are those of `next_token_loss`; a derivative of this would keep all logits.
    """
    operand = replicate(embedding).astype(hidden.dtype)

    def block_scores(block):
        logits, _, losses = _logits_and_losses(operand, *block)
        return -losses, jnp.argmax(logits, axis=-1) == block[1]

    blocks = _blocks(hidden, targets, jnp.ones(targets.shape, jnp.float32), embedding.shape[0])
    return TokenScores(*(_joined(x, hidden.shape[1]) for x in jax.lax.map(block_scores, blocks)))


@jax.custom_vjp
def _sum_loss(hidden: Array, embedding: Array, targets: Array, weights: Array) -> Array:
    return _position_losses(hidden, embedding, targets, weights).sum()


def _sum_loss_fwd(hidden, embedding, targets, weights):
    operand = embedding.astype(hidden.dtype)  # here: XLA would cast it again for each block

    def add_block(carry, block):
        total, d_embedding = carry
        hidden_BTD, targets_BT, weights_BT = block
        logits, log_sum_exp, losses = _logits_and_losses(operand, *block)
        is_target = cut.own_ids(targets_BT, logits.shape[-1])[..., None] == jnp.arange(logits.shape[-1])[None, None]
        d_logits = (jnp.exp(logits - log_sum_exp[..., None]) - is_target) * weights_BT[..., None]
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("btv,vd->btd", d_logits, operand)
        d_embedding += jnp.einsum("btv,btd->vd", d_logits, hidden_BTD, preferred_element_type=jnp.float32)
        return (total + losses.sum(), d_embedding), d_hidden

    start = (jnp.float32(0), jnp.zeros_like(embedding))
    blocks = _blocks(hidden, targets, weights, embedding.shape[0])
    (total, d_embedding), d_hidden = jax.lax.scan(add_block, start, blocks)
    return total, (_joined(d_hidden, hidden.shape[1]), d_embedding)


def _sum_loss_bwd(gradients, d_total):
    d_hidden, d_embedding = gradients
    if num_parts_here(TENSOR_AXIS) > 1:  # each part of the vocabulary is in the losses of all
        d_total = jax.lax.psum(d_total, TENSOR_AXIS)
    return (d_total * d_hidden).astype(d_hidden.dtype), d_total * d_embedding, None, None


_sum_loss.defvjp(_sum_loss_fwd, _sum_loss_bwd)


def _logits_and_losses(operand: Array, hidden: Array, targets: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Logits of one block [B, T, V], their log-sum-exps and the weighted losses.

    `operand` is the embedding of these V ids, in hidden's dtype.
    """
    logits = jnp.einsum("btd,vd->btv", hidden, operand, preferred_element_type=jnp.float32)
    log_sum_exp = jax.nn.logsumexp(logits, axis=-1)
    own = cut.own_ids(targets, logits.shape[-1])
    of_target = jnp.take_along_axis(logits, own[..., None], axis=-1)[..., 0]
    of_target = cut.of_owner(of_target, own, logits.shape[-1])
    if num_parts_here(TENSOR_AXIS) > 1:
        top = jax.lax.pmax(log_sum_exp, TENSOR_AXIS)
        log_sum_exp = top + jnp.log(jax.lax.psum(jnp.exp(log_sum_exp - top), TENSOR_AXIS))
    return logits, log_sum_exp, weights * (log_sum_exp - of_target)


def _blocks(hidden: Array, targets: Array, weights: Array, vocab_size: int) -> tuple[Array, Array, Array]:
    """The arrays cut along T into the blocks whose logits are held at a time, the block first; padding has weight 0."""
    batch_size, num_tokens = targets.shape
    max_tokens = max(1, min(num_tokens, _BLOCK_LOGITS // (rows_per_device(batch_size) * vocab_size)))
    num_blocks = -(-num_tokens // max_tokens)
    length = -(-num_tokens // num_blocks)

    def cut(x):
        padding = [(0, 0), (0, num_blocks * length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding)
        return jnp.moveaxis(x.reshape(x.shape[0], num_blocks, length, *x.shape[2:]), 1, 0)

    return cut(hidden), cut(targets), cut(weights.astype(jnp.float32))


def _joined(blocks: Array, num_tokens: int) -> Array:
    """Blocks [C, B, L, ...] as rows [B, T, ...], without the padding."""
    rows = jnp.moveaxis(blocks, 0, 1)
    return rows.reshape(rows.shape[0], -1, *rows.shape[3:])[:, :num_tokens]
