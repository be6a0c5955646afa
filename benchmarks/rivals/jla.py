"""The layers and training steps of jax-linear-attention, whose package is called `jla`."""

import dataclasses
import functools
import statistics
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jla import __version__, ops
from jla.layers.attention import Attention
from jla.layers.linear import Linear
from jla.layers.linear_attention import GatedDeltaNet
from jla.layers.norm import RMSNorm
from jla.models import AttentionConfig, LinearAttentionConfig, ModelConfig, build_model, get_preset
from jla.training.optimizers import create_optimizer
from jla.training.step import LossConfig, build_train_step, lm_loss

from benchmarks import card
from benchmarks.printed_rows import Row
from benchmarks.rivals import jax_passes
from benchmarks.rivals.jax_passes import Layer
from benchmarks.rivals.task import JLA, Task, note, reason, task_of_process
from benchmarks.timing import time_steps

STD, EPSILON = 0.02, 1e-6
# Of what the package has for one card without FP8: no recomputing but in its own backward passes, and the gradient of
# the logits made in the forward pass.
AS_TRAINED = {"remat": "none", "lean_vjp": True}


def attention_settings(task: Task, keys_seen: int | None) -> AttentionConfig:
    """Rotated queries and keys, a key head for each head."""
    return AttentionConfig(
        num_heads=task.heads,
        num_kv_heads=task.heads,
        head_dim=task.width // task.heads,
        qk_norm=False,
        sliding_window=keys_seen,
    )


def mixer(task: Task, name: str) -> eqx.Module:
    """The package's module for a layer, with float32 parameters."""
    head_dim = task.width // task.heads
    common = {"key": jax.random.key(0), "std": STD, "norm_eps": EPSILON}
    if name in ("attention", "local_attention"):
        keys_seen = task.keys_seen if name == "local_attention" else None
        return Attention(task.width, attention_settings(task, keys_seen), **common)
    heads, key_dim, value_dim = {
        "gated_deltanet": (3 * task.heads // 8, 2 * head_dim, 4 * head_dim),
        "gated_deltanet_square": (task.heads, head_dim, head_dim),
    }[name]
    config = LinearAttentionConfig(num_k_heads=heads, num_v_heads=heads, head_k_dim=key_dim, head_v_dim=value_dim)
    return GatedDeltaNet(task.width, config, **common)


def matrices_in_bfloat16(module: eqx.Module) -> eqx.Module:
    """What our layers do before they are timed: matrices are cast, vectors and convolutions are float32."""

    def cast(part: Any) -> Any:
        if not isinstance(part, Linear):
            return part
        return eqx.tree_at(lambda linear: linear.weight, part, part.weight.astype(jnp.bfloat16))

    return jax.tree.map(cast, module, is_leaf=lambda part: isinstance(part, Linear))


def make_layer(task: Task, name: str, rows: int, tokens: int) -> Layer:
    """x + mixer(norm(x)); linear_attention is the op by itself, whose values are x."""
    if name == "linear_attention":
        shape = rows, tokens, task.heads, task.width // task.heads
        query, key = (jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) for seed in (2, 3))
        no_decay = jnp.zeros((rows, tokens, 2 * task.heads), jnp.float32)
        return Layer((query, key, no_decay), attend, "jla.ops.linear_attention simple_gla, twice the heads")
    modules = RMSNorm(task.width, eps=EPSILON), matrices_in_bfloat16(mixer(task, name))
    arrays, static = eqx.partition(modules, eqx.is_inexact_array)

    def apply(arrays, x):
        norm, mixed = eqx.combine(arrays, static)
        if isinstance(mixed, Attention):
            return x + mixed(norm(x), jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))
        return x + mixed(norm(x))

    module = type(modules[1])
    return Layer(arrays, apply, f"{module.__module__}.{module.__name__}")


def attend(params: tuple[jax.Array, jax.Array, jax.Array], x: jax.Array) -> jax.Array:
    """out_t = sum_{s <= t} phi(q_t) phi(k_s)^T v_s with phi(x) = [softmax(x), softmax(-x)] and the values x [B, T, W].

    The kernels take features of 64 and 128 channels: each half of phi is a head of its own, and the two are added.
    The decays, 0, are an argument: of a constant of 8 million zeros XLA would compute the sums while it compiles.
    """
    query, key, no_decay = params
    value = x.reshape(query.shape)

    def features(part):
        part = part.astype(jnp.float32)
        return jnp.concatenate([jax.nn.softmax(part), jax.nn.softmax(-part)], axis=2).astype(x.dtype)

    values = jnp.concatenate([value, value], axis=2)
    out, _ = ops.linear_attention(
        "simple_gla", features(query), features(key), values, g=jax.lax.stop_gradient(no_decay), scale=1.0
    )
    halves = jnp.split(out.astype(jnp.float32), 2, axis=2)
    return (halves[0] + halves[1]).astype(x.dtype).reshape(x.shape)


def model_config(task: Task, name: str) -> tuple[ModelConfig, int]:
    """A model and the tokens of its sequences.

    attention_1b is the shape of configs/attention_1b.py but for the MLP: the package has gated ones alone, here of
    2/3 of the width, rounded up to a multiple of 128.
    """
    if task.small:
        sizes, tokens, width, heads = {"vocab_size": 256, "n_layers": 2, "d_ff": 128}, 64, 64, 4
    elif name == "attention_1b":
        sizes, tokens, width, heads = {"vocab_size": 32_000, "n_layers": 24, "d_ff": 5504}, 4096, 2048, 16
    else:
        return dataclasses.replace(get_preset(name), **AS_TRAINED), 4096
    shape = task._replace(width=width, heads=heads)
    return ModelConfig(d_model=width, attention=attention_settings(shape, None), **sizes, **AS_TRAINED), tokens


def model_row(task: Task, name: str, sequences: int) -> Row:
    """Training steps: loss, gradients, clipping, AdamW, float32 parameters, as in ours."""
    config, tokens = model_config(task, name)
    row: Row = {"model": name, "sequences": sequences, "tokens": tokens}
    row["how"] = f"remat {config.remat}, lean_vjp {config.lean_vjp}, logits' gradient in the forward pass"
    try:
        model = eqx.filter_jit(lambda: build_model(config, key=jax.random.key(0)))()
        params = eqx.filter(model, eqx.is_inexact_array)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        optimizer = create_optimizer(lr=3e-4, max_grad_norm=1.0)
        state = jax.jit(optimizer.init)(params)
        del params  # the step takes the model's buffers
        ids = jax.random.randint(jax.random.key(1), (1, sequences, tokens), 0, config.vocab_size, jnp.int32)
        batch = {"input_ids": ids, "labels": jnp.roll(ids, -1, axis=-1)}
        loss = LossConfig(impl="auto", grad_in_forward=True)
        step, key = build_train_step(optimizer, lm_loss(loss)), jax.random.key(2)
        applied = []

        def one(carried):
            model, state, metrics, key = step(carried[0], carried[1], batch, carried[2])
            applied.append(metrics["step_applied"])
            return (model, state, key), metrics

        times, _ = time_steps(one, (model, state, key), task.repeats + 4, jax.block_until_ready)
        if not all(applied):
            return row | {"error": "its steps left out their update: loss or gradient was no finite number"}
    except Exception as error:  # another library's step may raise any
        return row | {"error": reason(error)}
    step_s = statistics.median(times[2:])
    return row | {
        "step_ms": 1e3 * step_s,
        "tokens_per_s": sequences * tokens / step_s,
        "parameters": parameters,
    }


def main() -> None:
    """Prints every row."""
    task = task_of_process()
    note("imports done")
    card.share_memory()
    about = {"rival": JLA, "version": __version__}
    jax_passes.say_rows(task, functools.partial(make_layer, task), about)
    jax_passes.say_models(task, model_row, about)


if __name__ == "__main__":
    main()
