"""What a model costs by its config alone: parameters, operations, and the cache of a row."""

import functools

import jax
from flax import nnx

from rat_jax.checkpoints.store import abstract_model
from rat_jax.config import Config, ModelConfig
from rat_jax.flops import flops_per_token
from rat_jax.memory import tree_bytes


@functools.lru_cache(maxsize=64)
def num_parameters(config: ModelConfig) -> int:
    """Numbers in all parameters of a model."""
    return sum(x.size for x in jax.tree.leaves(abstract_model(config)[1]))


def training_flops(config: Config) -> float:
    """Operations that training on one token takes, as the MFU counts them."""
    return flops_per_token(config.model, num_parameters(config.model), config.data.seq_len)


@functools.lru_cache(maxsize=64)
def cache_bytes(config: ModelConfig, lengths: tuple[int, ...]) -> list[int]:
    """Bytes of the cache of one row of so many tokens, for each length: what the mixers' own caches take."""
    graphdef, params = abstract_model(config)

    def empty(params: nnx.State, capacity: int):
        return nnx.merge(graphdef, params).init_cache(1, capacity)

    return [tree_bytes(jax.eval_shape(functools.partial(empty, capacity=length), params)) for length in lengths]
