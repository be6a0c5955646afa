"""The TPU kernels of linear attention in interpret mode, against dense float64 sums over all pairs of tokens."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention import tpu as linear
from pallas_kernels.linear_attention import tpu_tiling
from pallas_kernels.linear_attention.shape import LinearAttentionShape

SMALL = tpu_tiling.Tiles(tokens=16, block=8, rows=16)


class Case(NamedTuple):
    query: np.ndarray  # [B, T, N, H]
    key: np.ndarray  # [B, T, K, H]
    value: np.ndarray
    initial_state: np.ndarray | None
    documents: np.ndarray | None
    d_out: np.ndarray
    d_final_state: np.ndarray


def make_case(tokens, heads, key_heads, head_dim, initial=None, packed=False, batch=2):
    rng = np.random.default_rng(tokens)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    documents = np.sort(rng.integers(0, 5, size=(batch, tokens)), axis=1).astype(np.int32) if packed else None
    return Case(
        query=normal(batch, tokens, heads, head_dim),
        key=normal(batch, tokens, key_heads, head_dim),
        value=normal(batch, tokens, key_heads, head_dim),
        initial_state=None if initial is None else normal(*initial, 2 * head_dim, head_dim),
        documents=documents,
        d_out=normal(batch, tokens, heads, head_dim),
        d_final_state=normal(batch, key_heads, 2 * head_dim, head_dim),
    )


def features(x, feature_map):
    """phi(x) [..., 2 H] and its derivative by x [..., 2 H, H]."""
    parts, slopes = [], []
    for sign in (1, -1):
        if feature_map == "relu":
            parts.append(np.maximum(sign * x, 0))
            slopes.append(sign * (sign * x > 0)[..., None] * np.eye(x.shape[-1]))
        else:
            weights = np.exp(sign * x - np.max(sign * x, axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            parts.append(weights)
            slopes.append(
                sign * (weights[..., None] * np.eye(x.shape[-1]) - weights[..., None] * weights[..., None, :])
            )
    return np.concatenate(parts, axis=-1), np.concatenate(slopes, axis=-2)


def truth(case, feature_map):
    """Results and gradients by name."""
    case = Case(*(None if x is None else x.astype(np.float64) for x in case))
    batch, tokens, heads, head_dim = case.query.shape
    key_heads = case.key.shape[2]
    shared = heads // key_heads
    documents = np.zeros((batch, tokens)) if case.documents is None else case.documents
    visible = np.tril(np.ones((tokens, tokens))) * (documents[:, :, None] == documents[:, None, :])
    in_last = (documents == documents[:, -1:]) * 1.0
    query, query_slope = features(case.query, feature_map)
    key, key_slope = features(case.key, feature_map)
    every_key, every_value = (np.repeat(x, shared, axis=2) for x in (key, case.value))
    initial = np.zeros((batch, heads, 2 * head_dim, head_dim))
    if case.initial_state is not None:
        initial += np.repeat(case.initial_state, heads // case.initial_state.shape[1], axis=1)
    scores = np.einsum("btnf,bsnf,bts->bnts", query, every_key, visible)
    d_scores = np.einsum("btnh,bsnh,bts->bnts", case.d_out, every_value, visible)
    d_query = np.einsum("bnts,bsnf->btnf", d_scores, every_key) + np.einsum("btnh,bnfh->btnf", case.d_out, initial)
    by_key_head = (batch, tokens, key_heads, shared, -1)
    d_key = np.einsum("bnts,btnf->bsnf", d_scores, query).reshape(by_key_head).sum(3)
    d_key += np.einsum("bskh,bkfh,bs->bskf", case.value, case.d_final_state, in_last)
    d_value = np.einsum("bnts,btnh->bsnh", scores, case.d_out).reshape(by_key_head).sum(3)
    d_value += np.einsum("bskf,bkfh,bs->bskh", key, case.d_final_state, in_last)
    found = dict(
        out=np.einsum("bnts,bsnh->btnh", scores, every_value) + np.einsum("btnf,bnfh->btnh", query, initial),
        final_state=np.einsum("bskf,bskh,bs->bkfh", key, case.value, in_last),
        d_query=np.einsum("btnf,btnfh->btnh", d_query, query_slope),
        d_key=np.einsum("bskf,bskfh->bskh", d_key, key_slope),
        d_value=d_value,
    )
    if case.initial_state is not None:
        rows, states = case.initial_state.shape[:2]
        d_initial = np.einsum("btnf,btnh->bnfh", query, case.d_out)
        d_initial = d_initial.reshape(batch, states, heads // states, *d_initial.shape[2:]).sum(2)
        found["d_initial_state"] = d_initial if rows == batch else d_initial.sum(0, keepdims=True)
    return found


def shape_of(case, feature_map):
    initial_rows, initial_heads = (0, 0) if case.initial_state is None else case.initial_state.shape[:2]
    return LinearAttentionShape(
        *case.query.shape[:3],
        *case.key.shape[2:],
        jnp.dtype(case.query.dtype).name,
        feature_map,
        segmented=case.documents is not None,
        initial_rows=initial_rows,
        initial_heads=initial_heads,
    )


# Interpreted kernels compile long and run short: leave out what only makes them faster.
@functools.partial(
    jax.jit,
    static_argnames=("shape", "interpret", "tiles"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def forward_and_backward(shape, case, **settings):
    arrays = dict(query=case.query, key=case.key, value=case.value)
    settings |= dict(initial_state=case.initial_state, segment_ids=case.documents)
    out, final_state, residuals = linear.linear_attention_forward(shape, **arrays, **settings)
    gradients = linear.linear_attention_backward(
        shape, residuals, **arrays, d_out=case.d_out, d_final_state=case.d_final_state, **settings
    )
    return out, final_state, *gradients


def run(case, feature_map, *, tiles=SMALL, dtype=jnp.float32, interpret=True):
    names = ("out", "final_state", "d_query", "d_key", "d_value", "d_initial_state")
    float32 = ("documents", "d_final_state", "initial_state")
    arrays = case._replace(**{n: jnp.asarray(x, dtype) for n, x in case._asdict().items() if n not in float32})
    results = forward_and_backward(shape_of(arrays, feature_map), arrays, interpret=interpret, tiles=tiles)
    return dict(zip(names, results, strict=True))


def check(case, feature_map, found, tolerance=3e-6):
    """Errors count against the largest true value of the array, at least 1."""
    for name, true in truth(case, feature_map).items():
        assert found[name].shape == true.shape, name
        error = np.abs(np.asarray(found[name], np.float64) - true).max()
        assert error <= tolerance * max(1.0, np.abs(true).max()), f"{name}: error {error:.2e}"


@pytest.mark.parametrize(
    ("feature_map", "sizes", "tiles"),
    [
        ("softmax", dict(tokens=1, heads=2, key_heads=1, head_dim=8), None),
        ("softmax", dict(tokens=45, heads=4, key_heads=2, head_dim=64, initial=(1, 4), packed=True), SMALL),
        ("softmax", dict(tokens=48, heads=2, key_heads=2, head_dim=128), SMALL),
        ("softmax", dict(tokens=40, heads=4, key_heads=1, head_dim=72, initial=(2, 4)), SMALL),
        ("relu", dict(tokens=300, heads=2, key_heads=1, head_dim=32, initial=(2, 1), packed=True), None),
        ("relu", dict(tokens=45, heads=4, key_heads=1, head_dim=160, initial=(1, 1)), SMALL),
    ],
    ids=str,
)
def test_values_and_gradients(feature_map, sizes, tiles):
    case = make_case(**sizes)
    check(case, feature_map, run(case, feature_map, tiles=tiles))


def test_true_gradient_is_the_slope_of_the_true_values():
    case = make_case(13, 4, 2, 4, initial=(1, 2), packed=True)
    names = ("query", "key", "value", "initial_state")
    rng = np.random.default_rng(2)
    steps = {name: rng.normal(size=getattr(case, name).shape) for name in names}
    case = Case(*(x if x is None or x.dtype == np.int32 else x.astype(np.float64) for x in case))

    def objective(distance):
        moved = truth(case._replace(**{n: getattr(case, n) + distance * s for n, s in steps.items()}), "softmax")
        return np.sum(moved["out"] * case.d_out) + np.sum(moved["final_state"] * case.d_final_state)

    true = truth(case, "softmax")
    slope = (objective(1e-5) - objective(-1e-5)) / 2e-5
    np.testing.assert_allclose(slope, sum(np.sum(true[f"d_{n}"] * s) for n, s in steps.items()), rtol=1e-7)


@pytest.mark.parametrize("feature_map", ["softmax", "relu"])
def test_bfloat16(feature_map):
    case = make_case(45, 4, 2, 64, initial=(1, 4), packed=True)
    halves = {n: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for n, x in case._asdict().items() if n[0] != "d"}
    case = case._replace(d_out=np.asarray(jnp.asarray(case.d_out, jnp.bfloat16), np.float32), **halves)
    found = run(case, feature_map, dtype=jnp.bfloat16)
    assert all(found[name].dtype == jnp.bfloat16 for name in ("out", "d_query", "d_key", "d_value"))
    assert found["final_state"].dtype == found["d_initial_state"].dtype == jnp.float32
    check(case, feature_map, found, 2 * float(jnp.finfo(jnp.bfloat16).eps))


def test_nothing_is_read_that_was_not_written():
    case = make_case(45, 4, 2, 8, initial=(1, 2), packed=True, batch=1)
    interpret = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="uninitialized")
    check(case, "softmax", run(case, "softmax", interpret=interpret))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dtype": "float16"}, "dtype float16 is none of bfloat16, float32"),
        ({"head_dim": 300}, "nearest: 256"),
        ({"initial_rows": 1, "initial_heads": 64, "num_heads": 64, "head_dim": 128}, "at most 16 initial states"),
        ({"key_lag": 1}, "shift keys and values instead"),
        ({"continued": True}, "implementation 'xla' does"),
    ],
)
def test_unsupported_calls_say_why(changes, text):
    shape = LinearAttentionShape(3, 8, 4, 2, 16, "float32", "relu", True, initial_rows=1, initial_heads=4)
    assert tpu_tiling.unsupported_reason(shape) is None
    assert text in tpu_tiling.unsupported_reason(dataclasses.replace(shape, **changes))
