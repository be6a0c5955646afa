"""What cannot be sampled, and sampling that cannot go on."""

from rat_jax.errors import RatJaxError, RunStopped


class SamplingError(RatJaxError, ValueError):
    """Prompts or settings that cannot be sampled from; the message names the row and the value."""


class SamplingStopped(SamplingError, RunStopped):
    """Sampling that had begun and cannot go on; completions that were handed out are good."""


def not_finite(name: str, num_tokens: int) -> SamplingStopped:
    """The error of a prompt of this name whose next token, after so many new ones, cannot be chosen."""
    return SamplingStopped(
        f"{name}: the logits of new token {num_tokens} are not finite: the model's parameters are damaged, or too "
        f"large for its dtype"
    )


def require(condition: bool, message: str) -> None:
    """Raises a `SamplingError` with the message unless the condition holds."""
    if not condition:
        raise SamplingError(message)
