"""Text from a model: prompts read into caches, tokens drawn, completions written."""

from rat_jax.sampling.generation import SamplingError, generate
from rat_jax.sampling.sampling_params import SamplingParams
from rat_jax.sampling.stop_strings import generate_text

__all__ = ["SamplingError", "SamplingParams", "generate", "generate_text"]
