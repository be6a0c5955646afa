"""The models against their PyTorch twin on shapes drawn at random: logits, and the gradient of every parameter."""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rat_jax.checkpoints.store import abstract_model
from rat_jax.config import ModelConfig
from rat_jax.mixers import MIXERS, AttentionConfig, LocalAttentionConfig, RatConfig, RnnConfig
from rat_jax.release.weights import release_state_dict

torch = pytest.importorskip("torch")
twin = pytest.importorskip("tests.torch_twin")

PATTERNS = [("attention",), ("local_attention",), ("rnn",), ("rat",), ("rat", "local_attention")]
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles three times faster
CASES = [
    (pattern, seed) for pattern in PATTERNS for seed in range(4 if pattern == ("rat",) else 1 + (len(pattern) == 2))
]
SLOW = [(("rat",), 0), (("rat",), 1)]  # chunks that leave a part over are in the hybrid's two


def random_config(pattern, seed):
    """A config and a number of tokens; RAT's chunks are those of 1, of all tokens, and two that leave a part over."""
    draw = random.Random(f"{pattern}{seed}")
    num_groups = draw.choice([1, 2, 3])
    num_heads, head_dim, tokens = num_groups * draw.choice([1, 2]), draw.choice([4, 6]), draw.choice([13, 19, 23])
    chunk_size = [draw.choice([3, 4]), draw.choice([5, 8]), 1, tokens][seed]
    settings = {
        "attention": {"rope": seed % 2 == 0},
        "local_attention": {"window": draw.choice([0, 4, 7]), "rope": seed % 2 == 0},
        "rnn": {"max_timescale": 20},
        "rat": {"chunk_size": chunk_size, "num_groups": num_groups, "rope": seed % 2 == 0},
    }
    config = ModelConfig(
        vocab_size=draw.choice([17, 29]),
        width=num_heads * head_dim,
        num_heads=num_heads,
        mlp_width=draw.choice([20, 28]),
        num_layers=len(pattern) * 2,
        pattern=pattern,
        mixers={kind: MIXERS[kind].Config(**settings[kind]) for kind in pattern},
    )
    return config, tokens


def make_twin(config):
    def mixer(name):
        match config.mixers[name]:
            case AttentionConfig(rope=rope):
                return twin.Attention(config.width, config.num_heads, rope=rope)
            case LocalAttentionConfig(window=window, rope=rope):
                return twin.Attention(config.width, config.num_heads, window, rope)
            case RnnConfig():
                return twin.Rnn(config.width)
            case RatConfig(chunk_size=chunk_size, num_groups=num_groups, rope=rope):
                return twin.Rat(config.width, config.num_heads, num_groups, chunk_size, rope)

    mixers = [mixer(config.pattern[i % len(config.pattern)]) for i in range(config.num_layers)]
    return twin.Model(config.vocab_size, config.width, config.mlp_width, mixers).double()


@pytest.mark.parametrize(
    ("pattern", "seed"), [pytest.param(*case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES]
)
def test_logits_and_gradients(pattern, seed):
    config, num_tokens = random_config(pattern, seed)
    rng = np.random.default_rng(seed)
    graphdef, shapes = abstract_model(config)
    # Large weights, uneven norms and biases, so that every part matters.
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.float32(0.3 * rng.standard_normal(x.shape) + ("scale" in jax.tree_util.keystr(path))),
        shapes,
    )
    tokens = rng.integers(0, config.vocab_size, (2, num_tokens))
    direction = rng.standard_normal((2, num_tokens, config.vocab_size))

    def product(params):
        logits = nnx.merge(graphdef, params)(jnp.asarray(tokens))
        return jnp.sum(logits * jnp.float32(direction)), logits

    (_, logits), gradients = jit(jax.value_and_grad(product, has_aux=True))(params)
    gradients = release_state_dict(nnx.merge(graphdef, gradients))

    model = make_twin(config)
    state_dict = release_state_dict(nnx.merge(graphdef, params))
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state_dict.items()})
    want = model(torch.from_numpy(tokens))
    (want * torch.from_numpy(direction)).sum().backward()
    want = want.detach().numpy()
    assert np.abs(logits - want).max() < 2e-5 * np.abs(want).max()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.numpy()
        assert np.abs(gradients[name] - gradient).max() < 1e-4 * np.abs(gradient).max(), name
