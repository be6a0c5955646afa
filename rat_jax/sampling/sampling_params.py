"""The rule by which the next token follows from a model's logits."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from rat_jax.sampling.errors import require
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

    @classmethod
    def of(
        cls,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
    ) -> "SamplingParams":
        """The rule of settings as users give them: temperature 0 takes the likeliest token, penalty 1 does nothing.

        Raises:
          SamplingError: if a setting is out of range or has no effect.
        """
        require(
            temperature == 0 or SMALLEST <= temperature < math.inf,
            f"temperature must be 0, which takes the likeliest token, or {SMALLEST} or more, got {temperature}",
        )
        require(top_k is None or top_k >= 1, f"top_k must be 1 or more, got {top_k}")
        require(top_p is None or SMALLEST <= top_p <= 1, f"top_p must lie between {SMALLEST} and 1, got {top_p}")
        for name, value in (("top_k", top_k), ("top_p", top_p)):
            require(
                value is None or temperature > 0,
                f"{name} {value} has no effect at temperature 0, which always takes the likeliest token: give a "
                f"temperature above 0, or leave {name} out",
            )
        require(
            1 / LARGEST_PENALTY <= repetition_penalty <= LARGEST_PENALTY,
            f"repetition_penalty must lie between {1 / LARGEST_PENALTY} and {LARGEST_PENALTY}, got "
            f"{repetition_penalty}",
        )
        return cls(
            temperature=None if temperature == 0 else temperature,
            top_k=top_k,
            top_p=None if top_p == 1 else top_p,
            repetition_penalty=None if repetition_penalty == 1 else repetition_penalty,
        )


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
