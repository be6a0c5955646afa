"""How well a run uses its devices: operations a token, peaks of devices, and the model FLOPs utilisation (MFU)."""

import jax

from rat_jax.config import ModelConfig

# Dense bfloat16 FLOP/s of one device, by the start of its name in JAX; the first that fits.
_PEAK_FLOPS = (
    ("NVIDIA H200", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA GH200", 989e12),
    ("NVIDIA A100", 312e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),  # v5p
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
)


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 FLOP/s that a device can do, or None where it is not known."""
    return next((flops for name, flops in _PEAK_FLOPS if device.device_kind.startswith(name)), None)


def flops_per_token(config: ModelConfig, num_parameters: int, seq_len: int) -> float:
    """Floating-point operations that training on one token takes, for the model FLOPs utilisation (MFU).

    6 P + 12 D sum_layers K: each of P parameters (the embedding counts once, as the head) is multiplied and added
    once forward and twice backward; so is each of the D channels for scores and for values of the K keys that a token
    sees on average. K = (T + 1) / 2 for attention, no more than window + 1 earlier tokens for local attention,
    (T / L - 1) / 2 + 1 for RAT, 0 for the RNN. RAttention has its window's and a state of 2 H by H, written once for
    each key head and read once for each query head, which counts as H (1 + num_kv_heads / num_heads) keys. Recomputed
    and elementwise operations are not counted.
    """
    repeats = config.num_layers // len(config.pattern)
    num_keys = sum(repeats * _mean_keys(kind, config, seq_len) for kind in config.pattern)
    return 6.0 * num_parameters + 12.0 * config.width * num_keys


def _mean_keys(kind: str, config: ModelConfig, seq_len: int) -> float:
    match kind:
        case "attention":
            return (seq_len + 1) / 2
        case "local_attention":
            return _mean_window(config.local_attention.window, seq_len)
        case "rattention":
            state = config.head_dim * (1 + config.kv_heads / config.num_heads)
            return _mean_window(config.rattention.window, seq_len) + state
        case "rat":
            chunk_size = min(config.rat.chunk_size, seq_len)
            return (seq_len / chunk_size - 1) / 2 + 1
        case "rnn":
            return 0.0
        case _:
            raise ValueError(f"no mixer is called {kind!r}")


def _mean_window(window: int, seq_len: int) -> float:
    most = min(window + 1, seq_len)
    return most - most * (most - 1) / (2 * seq_len)  # the first `most` tokens see 1, 2, ..., most
