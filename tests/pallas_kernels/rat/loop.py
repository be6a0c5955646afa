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


@dataclasses.dataclass
class Truth:
    """Everything the op returns."""

    out: np.ndarray  # [B, T, D]
    log_sum_exp: np.ndarray  # [B, N, T]
    summary_key: np.ndarray  # [B, C, N, H], rotated, zero where no chunk ends
    summary_value: np.ndarray
    d_projected: np.ndarray
    d_gate_bias: np.ndarray


def loop(case: Case, d_out: np.ndarray) -> Truth:
    """The op, and the gradients of sum(out * d_out)."""
    batch, tokens, width, heads, head_dim = case.sizes
    x = case.projected.astype(np.float64)
    bias = case.gate_bias.astype(np.float64)
    slots = -(-tokens // case.chunk_size)
    truth = Truth(
        out=np.zeros((batch, tokens, width)),
        log_sum_exp=np.zeros((batch, heads, tokens)),
        summary_key=np.zeros((batch, slots, heads, head_dim)),
        summary_value=np.zeros((batch, slots, heads, head_dim)),
        d_projected=np.zeros_like(x),
        d_gate_bias=np.zeros_like(bias),
    )
    for row in range(batch):
        for head in range(heads):
            group = head % case.num_groups
            own = slice(head * head_dim, (head + 1) * head_dim)
            starts = np.array([0, width, 2 * width, 3 * width, 3 * width + case.num_groups * head_dim])
            starts += np.array([head, head, head, group, group]) * head_dim
            columns = [slice(start, start + head_dim) for start in starts]
            parts = [x[row, :, column] for column in columns]
            places = _places(case, row)
            saved, summaries, y = _head_forward(case, parts, bias[own], places)
            gate = sigmoid(parts[0])
            truth.out[row, :, own] = gate * y
            truth.log_sum_exp[row, head] = [record["total"] for record in saved]
            for s in summaries:
                slot = s["t"] // case.chunk_size
                truth.summary_key[row, slot, head] = s["turned"]
                truth.summary_value[row, slot, head] = s["value"]
            d_y = d_out[row, :, own].astype(np.float64) * gate
            d_parts = _head_backward(case, parts, places, saved, y, d_y)
            truth.d_projected[row, :, columns[0]] += d_y * y * (1 - gate)
            for column, d_part in zip(columns[1:], d_parts, strict=True):
                truth.d_projected[row, :, column] += d_part
            truth.d_gate_bias[own] += d_parts[1].sum(axis=0)
    return truth


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
        seen_keys = np.array([s["turned"] for s in seen]).reshape(-1, bias.shape[0])
        seen_values = np.array([s["value"] for s in seen]).reshape(-1, bias.shape[0])
        turned = turn(queries[t], chunk, case.rope_base)
        scores = scale * np.append(seen_keys @ turned, queries[t] @ key)
        total = np.log(np.sum(np.exp(scores - scores.max()))) + scores.max()
        weights = np.exp(scores - total)
        outputs.append(weights[:-1] @ seen_values + weights[-1] * value)
        saved.append(dict(forget=forget, before=before, key=key, value=value, seen=seen, weights=weights, total=total))
        if document is not None and position % case.chunk_size == case.chunk_size - 1:
            turned = turn(key, chunk, case.rope_base)
            summaries.append(dict(document=document, turned=turned, value=value, chunk=chunk, t=t))
    return saved, summaries, np.stack(outputs)


def _head_backward(case, parts, places, saved, outputs, d_outputs):
    _, values, _, queries, keys = parts
    d_values, d_gates, d_queries, d_keys = (np.zeros_like(values) for _ in range(4))
    scale = values.shape[1] ** -0.5
    d_key_at, d_value_at = np.zeros_like(values), np.zeros_like(values)  # of each token's running pair
    d_turned_at = np.zeros_like(values)  # of its key as a summary
    for t, (_, position) in enumerate(places):
        record, chunk = saved[t], position // case.chunk_size
        centre = d_outputs[t] @ outputs[t]
        ends = [s["t"] for s in record["seen"]]
        if ends:
            seen_keys = np.array([s["turned"] for s in record["seen"]])
            seen_values = np.array([s["value"] for s in record["seen"]])
            d_scores = scale * record["weights"][:-1] * (seen_values @ d_outputs[t] - centre)
            d_queries[t] += turn(d_scores @ seen_keys, chunk, case.rope_base, back=True)
            d_turned_at[ends] += d_scores[:, None] * turn(queries[t], chunk, case.rope_base)[None]
            d_value_at[ends] += record["weights"][:-1, None] * d_outputs[t][None]
        weight = record["weights"][-1]
        d_score = scale * weight * (d_outputs[t] @ record["value"] - centre)
        d_queries[t] += d_score * record["key"]
        d_key_at[t] += d_score * queries[t]
        d_value_at[t] += weight * d_outputs[t]
    d_key, d_value = np.zeros(values.shape[1]), np.zeros(values.shape[1])
    for t in reversed(range(len(places))):
        record, (document, position) = saved[t], places[t]
        d_key = d_key + d_key_at[t] + turn(d_turned_at[t], position // case.chunk_size, case.rope_base, back=True)
        d_value = d_value + d_value_at[t]
        if document is None:
            continue
        forget, before = record["forget"], record["before"]
        d_forget = d_key * (before[0] - keys[t]) + d_value * (before[1] - values[t])
        d_gates[t] = d_forget * forget * (1 - forget)
        d_keys[t], d_values[t] = d_key * (1 - forget), d_value * (1 - forget)
        reset = position % case.chunk_size == 0
        d_key, d_value = (0.0 * d_key, 0.0 * d_value) if reset else (d_key * forget, d_value * forget)
    return d_values, d_gates, d_queries, d_keys
