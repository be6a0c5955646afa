"""What a model costs by its config alone: parameters, operations, and the cache of a row."""

import functools

import jax
from flax import nnx

from rat_jax.checkpoints.store import abstract_model
from rat_jax.config import Config, ModelConfig
from rat_jax.flops import flops_per_token


@functools.lru_cache(maxsize=64)
def num_parameters(config: ModelConfig) -> int:
    """Numbers in all parameters of a model."""
    return sum(x.size for x in jax.tree.leaves(abstract_model(config)[1]))


def training_flops(config: Config) -> float:
    """Operations that training on one token takes, as the MFU counts them."""
    return flops_per_token(config.model, num_parameters(config.model), config.data.seq_len)


@functools.lru_cache(maxsize=64)
def cache_bytes(config: ModelConfig, lengths: tuple[int, ...]) -> list[int]:
    """Bytes of the cache of one row of so many tokens, for each length."""
    model = nnx.merge(*abstract_model(config))
    return [model.cache_bytes(1, length) for length in lengths]
