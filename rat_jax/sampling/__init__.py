"""Text from a model: prompts read into caches, tokens drawn, completions written."""

from rat_jax.sampling.generation import SamplingError, generate
from rat_jax.sampling.sampling_params import SamplingParams

__all__ = ["SamplingError", "SamplingParams", "generate"]
