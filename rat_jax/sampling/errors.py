"""What cannot be sampled, and sampling that cannot go on."""

from rat_jax.errors import RatJaxError, RunStopped


class SamplingError(RatJaxError, ValueError):
    """Prompts or settings that cannot be sampled from; the message names the row and the value."""


class SamplingStopped(SamplingError, RunStopped):
    """Sampling that had begun and cannot go on; completions that were handed out are good."""


def require(condition: bool, message: str) -> None:
    """Raises a `SamplingError` with the message unless the condition holds."""
    if not condition:
        raise SamplingError(message)
