"""What the ops and the model compute, in NumPy float64 with one loop step a token: shares no code with `rat_jax`.

Axes have the letters of `rat_jax/shapes.py`. Rows are single documents: a test cuts packed rows into documents first.
"""

import math

import numpy as np


def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x, np.float64)))


def softmax(x):
    """Over a vector."""
    exp = np.exp(x - x.max())
    return exp / exp.sum()


def rms_norm(x, scale, epsilon=1e-6):
    """x [..., D] over its root mean square, times scale [D]."""
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * scale


def gelu(x):
    """x times the standard normal distribution function at x."""
    return x * 0.5 * (1 + np.vectorize(math.erf)(np.asarray(x, np.float64) / math.sqrt(2)))


def rotate(x, position, base=10_000.0):
    """Rotates the pairs (i, i + H/2) of a vector [H] by position * base**(-2 i / H)."""
    x = np.asarray(x, np.float64)
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position * base ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def gated_recurrence(gate, value, initial_state=None):
    """State s_t = f_t s_{t-1} + (1 - f_t) value_t with f = sigmoid(gate); gate, value [B, T, ...]."""
    gate, value = np.asarray(gate, np.float64), np.asarray(value, np.float64)
    state = np.zeros_like(value[:, 0]) if initial_state is None else np.asarray(initial_state, np.float64)
    states = np.empty_like(value)
    for t in range(value.shape[1]):
        forget = sigmoid(gate[:, t])
        state = forget * state + (1 - forget) * value[:, t]
        states[:, t] = state
    return states


def attention(query, key, value, window=None, rope_base=None):
    """Causal softmax attention; query, key, value [B, T, N, H]; a token sees itself and `window` tokens before it.

    rope_base: of the rotation by the token's position; None rotates nothing.
    """
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.empty_like(query)
    batch, tokens, heads, head_dim = query.shape
    for b in range(batch):
        for n in range(heads):
            q, k = query[b, :, n], key[b, :, n]
            if rope_base is not None:
                q, k = (np.stack([rotate(x[t], t, rope_base) for t in range(tokens)]) for x in (q, k))
            for t in range(tokens):
                first = 0 if window is None else max(0, t - window)
                scores = k[first : t + 1] @ q[t] / math.sqrt(head_dim)
                out[b, t, n] = softmax(scores) @ value[b, first : t + 1, n]
    return out


def rat_mix(projected, gate_bias, *, num_heads, num_groups, chunk_size, rope_base=10_000.0):
    """RAT between its two projections: [B, T, 3 D + 2 G H] with z, v, g, q, k in this order to [B, T, D].

    Chunk c holds tokens c L .. c L + L - 1. Inside it running means of v and k, gated by sigmoid(g + gate_bias), start
    from 0. Token t attends to the last pair of every earlier chunk and to its own running pair; queries and keys are
    rotated by their chunk; head n reads group n mod G. Last, the result is multiplied by sigmoid(z).
    """
    projected, gate_bias = np.asarray(projected, np.float64), np.asarray(gate_bias, np.float64)
    batch, tokens, _ = projected.shape
    width = len(gate_bias)
    head_dim = width // num_heads
    sizes = [width, width, width, num_groups * head_dim]
    z, v, g, q, k = np.split(projected, np.cumsum(sizes), axis=-1)
    out = np.empty((batch, tokens, width))
    for b in range(batch):
        for n in range(num_heads):
            own = slice(n * head_dim, (n + 1) * head_dim)
            group = slice((n % num_groups) * head_dim, (n % num_groups + 1) * head_dim)
            finished_keys, finished_values = [], []
            rotated_key = running_value = np.zeros(head_dim)
            for t in range(tokens):
                chunk = t // chunk_size
                if t % chunk_size == 0:
                    if t > 0:
                        finished_keys.append(rotated_key)
                        finished_values.append(running_value)
                    running_key = running_value = np.zeros(head_dim)
                forget = sigmoid(g[b, t, own] + gate_bias[own])
                running_value = forget * running_value + (1 - forget) * v[b, t, own]
                running_key = forget * running_key + (1 - forget) * k[b, t, group]
                query, rotated_key = q[b, t, group], running_key
                if rope_base is not None:
                    query, rotated_key = rotate(query, chunk, rope_base), rotate(running_key, chunk, rope_base)
                scores = np.array([*finished_keys, rotated_key]) @ query / math.sqrt(head_dim)
                mixed = softmax(scores) @ np.array([*finished_values, running_value])
                out[b, t, own] = sigmoid(z[b, t, own]) * mixed
    return out


def residual_linear_attention(q, k, v, initial_state, window, feature_map="softmax"):
    """Linear attention over what left the window (arXiv 2506.15545): the outputs [B, T, N, H] and the final state.

    S_t = S_{t-1} + phi(k_t)^T v_t, o_t = phi(q_t) S_{t-W-1}, with phi(x) = [softmax(x), softmax(-x)] or
    [relu(x), relu(-x)]; q [B, T, N, H], k and v [B, T, K, H] of which N / K neighbouring query heads share one;
    initial_state [B, N, 2 H, H] is S_{-1}. The final state is the one that the last token reads, S_{T-W-2}.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, tokens, heads, _ = q.shape
    shared = heads // k.shape[2]

    def features(x):
        if feature_map == "softmax":
            return np.concatenate([softmax(x), softmax(-x)])
        return np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)])

    out, state = np.empty_like(q), np.array(initial_state, np.float64)
    for b in range(batch):
        for n in range(heads):
            for t in range(tokens):
                left = t - window - 1  # the token that has just left the window
                if left >= 0:
                    state[b, n] += np.outer(features(k[b, left, n // shared]), v[b, left, n // shared])
                out[b, t, n] = features(q[b, t, n]) @ state[b, n]
    return out, state


def gated_delta_rule(query, key, value, log_decay, write_strength, initial_state=None):
    """The outputs [B, T, N, Hv] and the final state [B, N, Hk, Hv] of arXiv 2412.06464's rule.

    S_t = a S_{t-1} + b k (v - a S_{t-1}^T k)^T with a = exp(log_decay), b = write_strength; out_t = S_t^T q, unscaled.
    """
    query, key, value, log_decay, write_strength = (
        np.asarray(x, np.float64) for x in (query, key, value, log_decay, write_strength)
    )
    batch, tokens, heads, key_dim = key.shape
    state = np.zeros((batch, heads, key_dim, value.shape[-1])) if initial_state is None else initial_state
    out, state = np.empty_like(value), np.array(state, np.float64)
    for b in range(batch):
        for n in range(heads):
            for t in range(tokens):
                state[b, n] *= np.exp(log_decay[b, t, n])
                wrong = value[b, t, n] - key[b, t, n] @ state[b, n]
                state[b, n] += write_strength[b, t, n] * np.outer(key[b, t, n], wrong)
                out[b, t, n] = query[b, t, n] @ state[b, n]
    return out, state


def language_model(parameters, tokens, pattern, *, num_heads, num_groups, chunk_size, window, rope_base=10_000.0):
    """Logits [B, T, V] of a whole model from parameters by the names of the PyTorch release (matrices transposed).

    pattern: kinds of mixers, repeated over the layers; rope_base None: no mixer rotates.
    """
    parameters = {name: np.asarray(array, np.float64) for name, array in parameters.items()}
    x = parameters["embedding.wte.weight"][tokens]
    num_layers = 1 + max(int(name.split(".")[2]) for name in parameters if name.startswith("backbone.layers."))
    for layer in range(num_layers):
        prefix = f"backbone.layers.{layer}."
        p = {name.removeprefix(prefix): array for name, array in parameters.items() if name.startswith(prefix)}
        projected = rms_norm(x, p["seq_layer.input_norm.weight"]) @ p["seq_layer.in_proj.weight"].T
        match pattern[layer % len(pattern)]:
            case "rat":
                sizes = {"num_heads": num_heads, "num_groups": num_groups, "chunk_size": chunk_size}
                mixed = rat_mix(projected, p["seq_layer.gate_bias"], rope_base=rope_base, **sizes)
            case "rnn":
                z, v, g = np.split(projected, 3, axis=-1)
                mixed = sigmoid(z) * gated_recurrence(g + p["seq_layer.gate_bias"], v)
            case "attention" | "local_attention" as kind:
                v, q, k = (part.reshape(*x.shape[:2], num_heads, -1) for part in np.split(projected, 3, axis=-1))
                mixed = attention(q, k, v, window if kind == "local_attention" else None, rope_base).reshape(x.shape)
        x = x + mixed @ p["seq_layer.out_proj.weight"].T
        hidden = gelu(rms_norm(x, p["hidden_layer.ln.weight"]) @ p["hidden_layer.fc1.weight"].T)
        x = x + hidden @ p["hidden_layer.fc2.weight"].T
    return rms_norm(x, parameters["backbone.ln.weight"]) @ parameters["head.lm_head.weight"].T
