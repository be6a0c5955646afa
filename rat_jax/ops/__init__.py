"""Differentiable functions of arrays: each op is its equation, an XLA implementation, and the choice among kernels."""

from rat_jax.ops.attention import attention
from rat_jax.ops.attention_types import AttentionOutput, KeyInfo
from rat_jax.ops.between_mixers import BetweenMixersOutput, NormedMatrix, between_mixers
from rat_jax.ops.convolved_heads import convolved_heads
from rat_jax.ops.convolved_heads_types import ConvolvedHeads
from rat_jax.ops.dispatch import UnsupportedError
from rat_jax.ops.gated_delta_rule import gated_delta_rule
from rat_jax.ops.gated_delta_rule_types import GatedDeltaRuleOutput
from rat_jax.ops.linear_attention import linear_attention
from rat_jax.ops.linear_attention_types import LinearAttentionOutput
from rat_jax.ops.mlp import gelu_mlp
from rat_jax.ops.normed_product import normed_product
from rat_jax.ops.normed_sum import normed_sum
from rat_jax.ops.rat import rat_mix
from rat_jax.ops.rat_types import RatOutput, RatState
from rat_jax.ops.recurrence import gated_recurrence
from rat_jax.ops.residual_linear_attention import ResidualLinearAttentionOutput, residual_linear_attention
from rat_jax.ops.residual_norm import ResidualNormOutput, residual_norm
from rat_jax.ops.rnn import rnn_mix
from rat_jax.ops.rnn_types import RnnOutput

__all__ = [
    "AttentionOutput",
    "BetweenMixersOutput",
    "ConvolvedHeads",
    "GatedDeltaRuleOutput",
    "KeyInfo",
    "LinearAttentionOutput",
    "NormedMatrix",
    "RatOutput",
    "RatState",
    "ResidualLinearAttentionOutput",
    "ResidualNormOutput",
    "RnnOutput",
    "UnsupportedError",
    "attention",
    "between_mixers",
    "convolved_heads",
    "gated_delta_rule",
    "gated_recurrence",
    "gelu_mlp",
    "linear_attention",
    "normed_product",
    "normed_sum",
    "rat_mix",
    "residual_linear_attention",
    "residual_norm",
    "rnn_mix",
]
