"""The error of evaluations."""

from rat_jax.errors import RatJaxError


class EvaluationError(RatJaxError, ValueError):
    """An evaluation that has no result; the message says what to change."""
