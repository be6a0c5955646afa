"""The rule by which the next token follows from a model's logits."""

import dataclasses

import jax
import jax.numpy as jnp

from rat_jax.shapes import Array, Bool, Float32, Int

# Logits are float32: a smaller temperature or top-p would be 0 there, and larger factors infinite.
SMALLEST = 1e-6
LARGEST_PENALTY = 1e3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token follows from the logits; see `adjust_logits` for the equations. None switches a part off."""

    temperature: float | None  # None takes the likeliest token
    top_k: int | None = dataclasses.field(metadata={"static": True})
    top_p: float | None
    repetition_penalty: float | None


def adjust_logits(
    logits: Float32[Array, "B V"], seen: Bool[Array, "B V"] | None, rule: SamplingParams
) -> Float32[Array, "B V"]:
    """Logits of the distribution that a rule draws from, -inf where it never does; the parts in the order they apply.

      repetition penalty r   l_i / r if l_i > 0, else l_i r, for tokens i that the row has read or chosen (arXiv
                             1909.05858, section 4.1, so defined that r > 1 lowers negative logits too)
      temperature t          l_i / t
      top-k                  keeps l_i >= the k-th largest logit; more than k where some are equal to it
      top-p                  keeps the likeliest tokens until their probability reaches p: i stays if the tokens that
                             are likelier than i have less than p together (arXiv 1904.09751)

    Args:
      logits: of the next token.
      seen: tokens that the row has read or chosen; only the repetition penalty needs it.
      rule: what to apply.
    """
    if rule.repetition_penalty is not None:
        penalised = jnp.where(logits > 0, logits / rule.repetition_penalty, logits * rule.repetition_penalty)
        logits = jnp.where(seen, penalised, logits)
    if rule.temperature is not None:
        logits = logits / rule.temperature
    if rule.top_k is not None and rule.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, rule.top_k)[0][:, -1:]
        logits = jnp.where(logits >= smallest, logits, -jnp.inf)
    if rule.top_p is not None:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
        smallest = jnp.min(jnp.where(likelier < rule.top_p, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= smallest, logits, -jnp.inf)
    return logits


def choose_tokens(
    logits: Float32[Array, "B V"], seen: Bool[Array, "B V"] | None, keys: Array, rule: SamplingParams
) -> Int[Array, " B"]:
    """A token for each row, from the row's own key: the other rows change nothing."""
    logits = adjust_logits(logits, seen, rule)
    if rule.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
