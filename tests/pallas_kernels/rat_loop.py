"""The RAT mixing op and its gradients as float64 NumPy loops over tokens, sharing no code with the kernels."""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Case:
    """One problem: channels in the order z, v, g, q, k."""

    projected: np.ndarray  # [B, T, 3 D + 2 G H]
    gate_bias: np.ndarray  # [D]
    num_groups: int
    chunk_size: int
    rope_base: float | None
    positions: np.ndarray | None = None  # [B, T]
    segment_ids: np.ndarray | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, T, D, N, H."""
        batch, tokens, channels = self.projected.shape
        width = self.gate_bias.shape[0]
        head_dim = (channels - 3 * width) // (2 * self.num_groups)
        return batch, tokens, width, width // head_dim, head_dim


def sigmoid(x):
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def turn(x, chunk, base, back=False):
    """Rotates the pairs (i, i + H/2) by chunk * base**(-2i/H)."""
    if base is None:
        return x
    half = x.shape[-1] // 2
    angle = chunk * base ** (-2.0 * np.arange(half) / x.shape[-1]) * (-1 if back else 1)
    first, second = x[:half], x[half:]
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
    )


def loop(case: Case, d_out: np.ndarray | None = None):
    """The output [B, T, D], the log-sum-exp [B, N, T] and, given `d_out`, gradients of `projected` and `gate_bias`."""
    batch, tokens, width, heads, head_dim = case.sizes
    x = case.projected.astype(np.float64)
    bias = case.gate_bias.astype(np.float64)
    out, log_sum_exp = np.zeros((batch, tokens, width)), np.zeros((batch, heads, tokens))
    d_x, d_bias = np.zeros_like(x), np.zeros_like(bias)
    for row in range(batch):
        for head in range(heads):
            group = head % case.num_groups
            own = slice(head * head_dim, (head + 1) * head_dim)
            starts = np.array([0, width, 2 * width, 3 * width, 3 * width + case.num_groups * head_dim])
            starts += np.array([head, head, head, group, group]) * head_dim
            columns = [slice(start, start + head_dim) for start in starts]
            parts = [x[row, :, column] for column in columns]
            place = _places(case, row)
            saved, y = _head_forward(case, parts, bias[own], place)
            gate = sigmoid(parts[0])
            out[row, :, own] = gate * y
            log_sum_exp[row, head] = [record["total"] for record in saved]
            if d_out is not None:
                d_y = d_out[row, :, own].astype(np.float64) * gate
                d_parts = _head_backward(case, parts, place, saved, y, d_y)
                d_x[row, :, columns[0]] += d_y * y * (1 - gate)
                for column, d_part in zip(columns[1:], d_parts, strict=True):
                    d_x[row, :, column] += d_part
                d_bias[own] += d_parts[1].sum(axis=0)
    return (out, log_sum_exp) if d_out is None else (out, log_sum_exp, d_x, d_bias)


def _places(case: Case, row: int):
    """(document or None for padding, position) of every token; ids may return for another document."""
    if case.segment_ids is None:
        return [(0, t) for t in range(case.sizes[1])]
    places, document = [], -1
    for segment, position in zip(case.segment_ids[row], case.positions[row], strict=True):
        document += segment != 0 and position == 0
        places.append((document if segment else None, int(position)))
    return places


def _head_forward(case, parts, bias, places):
    _, values, gates, queries, keys = parts
    key, value = np.zeros(bias.shape), np.zeros(bias.shape)
    summaries, saved, outputs = [], [], []
    scale = bias.shape[0] ** -0.5
    for t, (document, position) in enumerate(places):
        chunk = position // case.chunk_size
        before = key, value
        forget = sigmoid(gates[t] + bias)
        if document is not None:
            if position % case.chunk_size == 0:
                before = np.zeros_like(key), np.zeros_like(value)
            key = forget * before[0] + (1 - forget) * keys[t]
            value = forget * before[1] + (1 - forget) * values[t]
        seen = [s for s in summaries if document is not None and s["document"] == document]
        scores = [turn(queries[t], chunk, case.rope_base) @ turn(s["key"], s["chunk"], case.rope_base) for s in seen]
        scores = scale * np.array([*scores, queries[t] @ key])
        total = np.log(np.sum(np.exp(scores - scores.max()))) + scores.max()
        weights = np.exp(scores - total)
        outputs.append(weights @ np.stack([*(s["value"] for s in seen), value]))
        saved.append(dict(forget=forget, before=before, key=key, value=value, seen=seen, weights=weights, total=total))
        if document is not None and position % case.chunk_size == case.chunk_size - 1:
            summaries.append(dict(document=document, key=key, value=value, chunk=chunk, t=t))
    return saved, np.stack(outputs)


def _head_backward(case, parts, places, saved, outputs, d_outputs):
    _, values, _, queries, keys = parts
    d_values, d_gates, d_queries, d_keys = (np.zeros_like(values) for _ in range(4))
    scale = values.shape[1] ** -0.5
    d_key_at, d_value_at = np.zeros_like(values), np.zeros_like(values)  # of each token's running pair
    for t, (_, position) in enumerate(places):
        record, chunk = saved[t], position // case.chunk_size
        centre = d_outputs[t] @ outputs[t]
        for s, weight in zip(record["seen"], record["weights"][:-1], strict=True):
            d_score = scale * weight * (d_outputs[t] @ s["value"] - centre)
            turned = turn(s["key"], s["chunk"], case.rope_base)
            d_queries[t] += d_score * turn(turned, chunk, case.rope_base, back=True)
            turned = turn(queries[t], chunk, case.rope_base)
            d_key_at[s["t"]] += d_score * turn(turned, s["chunk"], case.rope_base, back=True)
            d_value_at[s["t"]] += weight * d_outputs[t]
        weight = record["weights"][-1]
        d_score = scale * weight * (d_outputs[t] @ record["value"] - centre)
        d_queries[t] += d_score * record["key"]
        d_key_at[t] += d_score * queries[t]
        d_value_at[t] += weight * d_outputs[t]
    d_key, d_value = np.zeros(values.shape[1]), np.zeros(values.shape[1])
    for t in reversed(range(len(places))):
        record, (document, position) = saved[t], places[t]
        d_key, d_value = d_key + d_key_at[t], d_value + d_value_at[t]
        if document is None:
            continue
        forget, before = record["forget"], record["before"]
        d_forget = d_key * (before[0] - keys[t]) + d_value * (before[1] - values[t])
        d_gates[t] = d_forget * forget * (1 - forget)
        d_keys[t], d_values[t] = d_key * (1 - forget), d_value * (1 - forget)
        reset = position % case.chunk_size == 0
        d_key, d_value = (0.0 * d_key, 0.0 * d_value) if reset else (d_key * forget, d_value * forget)
    return d_values, d_gates, d_queries, d_keys


def final_state(case: Case):
    """Running keys and values after the last token, [B, N, H] each."""
    batch, _, _, heads, head_dim = case.sizes
    keys, values = np.zeros((batch, heads, head_dim)), np.zeros((batch, heads, head_dim))
    x, bias = case.projected.astype(np.float64), case.gate_bias.astype(np.float64)
    for row in range(batch):
        for head in range(heads):
            group, width = head % case.num_groups, heads * head_dim
            starts = [0, width + head * head_dim, 2 * width + head * head_dim, 3 * width + group * head_dim]
            starts.append(3 * width + (case.num_groups + group) * head_dim)
            parts = [x[row, :, start : start + head_dim] for start in starts]
            saved, _ = _head_forward(
                case, parts, bias[head * head_dim : (head + 1) * head_dim], _places(case, row)
            )
            keys[row, head], values[row, head] = saved[-1]["key"], saved[-1]["value"]
    return keys, values
