"""AdamW, its learning-rate schedule and clipping, step for step as the PyTorch release trains (arXiv 2507.04416)."""

import math

import jax
import jax.numpy as jnp
import optax

from rat_jax.config import OptimizerConfig

_CLIP_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate at step s = 0, 1, ..., num_steps - 1, float32.

    With w = floor(warmup_fraction num_steps): learning_rate (s + 1) / w for s < w, then
    min + (learning_rate - min) (1 + cos(pi (s - w) / (num_steps - w))) / 2. The first value is learning_rate / w, or
    learning_rate without a warm-up; min is the value at s = num_steps, which no step has.
    """
    warmup = math.floor(config.warmup_fraction * num_steps + 1e-6)  # 0.29 * 100 is 28.999...
    peak, least = config.learning_rate, config.min_learning_rate

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        rising = peak * (step + 1) / max(warmup, 1)
        progress = (step - warmup) / max(num_steps - warmup, 1)
        falling = least + (peak - least) * (1 + jnp.cos(math.pi * progress)) / 2
        return jnp.where(step < warmup, rising, falling)

    return schedule


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW.

    With gradient g and n its global L2 norm: g <- g min(1, clip_norm / (n + 1e-6)); m, v the running means of g and
    g^2 with bias corrected; p <- p - lr (m / (sqrt(v) + epsilon) + weight_decay p), for every parameter p.
    """
    return optax.named_chain(
        ("clip", clip_by_global_norm(config.clip_norm)),
        ("adam", optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)),
        ("weight_decay", optax.add_decayed_weights(config.weight_decay)),
        ("learning_rate", optax.scale_by_learning_rate(learning_rate_schedule(config, num_steps))),
    )


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients by min(1, max_norm / (n + 1e-6)), n their global L2 norm, as torch does.

    optax.clip_by_global_norm leaves out the 1e-6, which shows in float32.
    """

    def update(updates, params=None):
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + _CLIP_EPSILON))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates)

    return optax.stateless(update)
