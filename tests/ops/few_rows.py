"""What the tests of launches for decode steps of few rows share."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from rat_jax.mixers import GatedDeltaNetConfig
from rat_jax.model import LanguageModel
from tests.ops.devices import take_cpu_for_hopper
from tests.small import small_model_config, with_random_scales


def take_cpu_for_hopper_alone(monkeypatch: pytest.MonkeyPatch, tiling) -> None:
    """As `take_cpu_for_hopper`, but for RAT's mixing; any number of programs fills the card, by the kernel's tiling."""
    take_cpu_for_hopper(monkeypatch)
    monkeypatch.setattr(tiling, "fills_card", lambda shape: True)
    monkeypatch.setattr("rat_jax.ops.rat._FASTEST_FIRST", ())


def small_model(*pattern: str, **changes) -> LanguageModel:
    """A model with a layer of each mixer, of whole tiles; each norm has a scale of its own."""
    sizes = {"width": 128, "num_heads": 2, "num_layers": len(pattern), "mlp_width": 256, "dtype": "bfloat16"}
    config = small_model_config(pattern, **(sizes | changes))
    rule = GatedDeltaNetConfig(num_heads=2, head_dim=64)
    config = dataclasses.replace(config, mixers=config.mixers | {"gated_deltanet": rule})
    return with_random_scales(LanguageModel(config, rngs=nnx.Rngs(0)))


def check_steps_alone_run(kernel: str, most_rows: int) -> None:
    """A decode step of so many rows runs the kernel; one of more rows, prompts and training do not."""
    model = small_model("rat", "rnn")
    graphdef, params = nnx.split(model)
    decoder = model.decoder()

    def loss(params, tokens):
        return nnx.merge(graphdef, params)(tokens).sum()

    def runs_kernel(function, *arguments) -> bool:
        return kernel in str(jax.make_jaxpr(function)(*arguments))

    for rows, tokens, chosen in ((most_rows, 1, True), (most_rows + 1, 1, False), (most_rows, 2, False)):
        cache = jax.eval_shape(lambda rows=rows: decoder.init_cache(rows, 16))
        ids = jnp.zeros((rows, tokens), jnp.int32)
        assert runs_kernel(decoder.extend, ids, cache) == chosen
        if tokens > 1:
            assert not runs_kernel(jax.grad(loss), params, ids)
