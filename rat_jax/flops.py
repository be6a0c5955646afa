"""How well a run uses its devices: operations a token, and the model FLOPs utilisation (MFU)."""

import jax

from rat_jax.chips import chip_of
from rat_jax.config import ModelConfig


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 FLOP/s that a device can do, or None where it is not known."""
    chip = chip_of(device.device_kind)
    return None if chip is None else chip.flops


def flops_per_token(config: ModelConfig, num_parameters: int, seq_len: int) -> float:
    """Floating-point operations that training on one token takes, for the model FLOPs utilisation (MFU).

    6 P + 12 D sum_layers K: each of P parameters (the embedding counts once, as the head) is multiplied and added
    once forward and twice backward; so is each of the D channels for scores and for values of the K keys that a token
    meets on average, which `mean_keys` of each mixer's config says. Recomputed and elementwise operations are not
    counted.
    """
    num_keys = config.num_repeats * sum(config.mixers[name].mean_keys(config, seq_len) for name in config.pattern)
    return 6.0 * num_parameters + 12.0 * config.width * num_keys


def mfu(
    config: ModelConfig, num_parameters: int, seq_len: int, tokens_per_sec: float, device: jax.Device
) -> float | None:
    """Model FLOPs utilisation: `flops_per_token` times a device's tokens a second, as a share of its peak.

    The one definition for logs, benchmarks and documents; None where the device's peak is not known.
    """
    peak = peak_flops(device)
    return None if peak is None else flops_per_token(config, num_parameters, seq_len) * tokens_per_sec / peak
