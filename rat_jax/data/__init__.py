"""Text and examples to token files (`python -m rat_jax.data.prepare`), these to batches (`rat_jax.data.pipeline`)."""

from rat_jax.errors import RatJaxError


class DataError(RatJaxError, ValueError):
    """Text, tokens or a tokenizer that cannot be used; the message names the file and says what to change."""
