"""Softmax attention in float64, over all pairs of tokens, with its gradients."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

NAMES = ("out", "log_sum_exp", "d_query", "d_key", "d_value")


class Case(NamedTuple):
    """Arrays of a call, float32 numbers of its dtype."""

    query: np.ndarray  # [B, T, N, H]
    key: np.ndarray  # [B, T, K, H]
    value: np.ndarray
    documents: np.ndarray | None
    d_out: np.ndarray
    window: int | None


def make_case(tokens, heads=1, key_heads=1, head_dim=8, window=None, packed=False, dtype=np.float32) -> Case:
    """Random; packed rows are two, of up to three documents, and have padding at an end."""
    rng = np.random.default_rng(tokens)
    rows = 2 if packed else 1

    def normal(count):
        x = rng.normal(size=(rows, tokens, count, head_dim)).astype(np.float32)
        return np.asarray(jnp.asarray(x, dtype), np.float32)

    documents = None
    if packed:
        documents = np.sort(rng.integers(1, 4, size=(2, tokens)), axis=1).astype(np.int32)
        documents[0, : tokens // 8], documents[1, -tokens // 4 :] = 0, 0
    return Case(normal(heads), normal(key_heads), normal(key_heads), documents, normal(heads), window)


def truth(case: Case) -> dict[str, np.ndarray]:
    """Results and gradients by name."""
    query, key, value, d_out = (x.astype(np.float64) for x in (case.query, case.key, case.value, case.d_out))
    batch, tokens, heads, head_dim = query.shape
    documents = np.ones((batch, tokens)) if case.documents is None else case.documents
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    visible = (documents[:, :, None] == documents[:, None, :]) & (documents[:, None, :] != 0) & (distance >= 0)
    if case.window is not None:
        visible &= distance <= case.window
    shared = heads // key.shape[2]
    every_key, every_value = (np.repeat(x, shared, axis=2) for x in (key, value))
    scores = np.einsum("btnh,bsnh->bnts", query, every_key) / np.sqrt(head_dim)
    weights = np.where(visible[:, None], np.exp(scores), 0.0)
    total = weights.sum(-1, keepdims=True)
    p = weights / np.where(total == 0, 1, total)
    out = np.einsum("bnts,bsnh->btnh", p, every_value)
    d_p = np.einsum("btnh,bsnh->bnts", d_out, every_value)
    d_scores = p * (d_p - np.einsum("btnh,btnh->bnt", d_out, out)[..., None]) / np.sqrt(head_dim)
    by_key_head = (batch, tokens, heads // shared, shared, head_dim)
    with np.errstate(divide="ignore"):
        log_sum_exp = np.log(total[..., 0]).transpose(0, 2, 1)
    return {
        "out": out,
        "log_sum_exp": np.where(documents[..., None] == 0, -1e30, log_sum_exp),
        "d_query": np.einsum("bnts,bsnh->btnh", d_scores, every_key),
        "d_key": np.einsum("bnts,btnh->bsnh", d_scores, query).reshape(by_key_head).sum(3),
        "d_value": np.einsum("bnts,btnh->bsnh", p, d_out).reshape(by_key_head).sum(3),
    }
