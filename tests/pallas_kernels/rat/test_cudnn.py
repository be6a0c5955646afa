"""RAT's attention to summaries by cuDNN: folding, sums, refusals, and on a GPU the calls themselves."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import cudnn_fmha
from pallas_kernels.launch.sizes import LOG2_E
from pallas_kernels.rat import cudnn_attention
from pallas_kernels.rat.shape import RatShape

SHAPES = {
    "whole": RatShape(2, 24, 4, 2, 8, 4, "float32", 10_000.0, False),
    "partial-chunk": RatShape(2, 27, 4, 1, 8, 4, "float32", 10_000.0, False),
    "two-chunks": RatShape(1, 5, 3, 3, 8, 4, "float32", 10_000.0, False),
    "chunks-of-one": RatShape(1, 6, 2, 2, 16, 1, "float32", 10_000.0, False),
}
FORWARD = ("projected", "running_values", "current_scores", "rotated_queries", "summary_keys", "summary_values")
BACKWARD = ("d_heads", "delta", "lse", "rotated_queries", "summary_keys", "summary_values", "current_scores",
            "running_values")  # fmt: skip
RESULTS = (
    "out",
    "lse",
    "d_rotated_queries",
    "d_current_scores",
    "current_weights",
    "d_summary_keys",
    "d_summary_values",
)


def inputs(p: RatShape) -> dict[str, np.ndarray]:
    """Random arguments of the forward pass, and do; the last slot's summary is undefined."""
    random = np.random.default_rng(p.tokens)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.dtype(p.dtype))

    x = {
        "projected": normal(p.batch, p.tokens, p.projected_width),
        "running_values": normal(p.batch, p.tokens, p.num_heads, p.head_dim),
        "current_scores": normal(p.batch, p.num_heads, p.tokens).astype(jnp.float32),
        "rotated_queries": normal(p.batch, p.tokens, p.num_groups, p.head_dim) * LOG2_E / math.sqrt(p.head_dim),
        "summary_keys": normal(p.batch, p.num_chunks, p.num_heads, p.head_dim).at[:, -1].set(jnp.nan),
        "summary_values": normal(p.batch, p.num_chunks, p.num_heads, p.head_dim).at[:, -1].set(jnp.nan),
        "d_heads": normal(p.batch, p.tokens, p.num_heads, p.head_dim),
    }
    return x | {"rotated_queries": x["rotated_queries"].astype(p.dtype)}


def truth(p: RatShape, x) -> dict[str, np.ndarray]:
    """Everything that the two passes return, and delta, in float64, a row and a head at a time."""
    x = {name: np.asarray(array, np.float64) for name, array in x.items()}
    result = {name: [] for name in (*RESULTS, "delta")}
    gate = 1 / (1 + np.exp(-x["projected"][..., : p.width]))
    seen = np.arange(p.num_chunks - 1) < (np.arange(p.tokens) // p.chunk_size)[:, None]
    d_queries = np.zeros((p.batch, p.tokens, p.num_groups, p.head_dim))
    for row in range(p.batch):
        for head in range(p.num_heads):
            group = head % p.num_groups
            q = x["rotated_queries"][row, :, group]
            v, do = x["running_values"][row, :, head], x["d_heads"][row, :, head]
            keys, values = x["summary_keys"][row, :-1, head], x["summary_values"][row, :-1, head]
            own = x["current_scores"][row, head]
            weights = np.where(seen, np.exp2(q @ keys.T), 0)
            total = weights.sum(axis=1) + np.exp2(own)
            p_own, weights = np.exp2(own) / total, weights / total[:, None]
            mixed = weights @ values + p_own[:, None] * v
            delta = (do * mixed).sum(axis=1)
            d_scores = weights * (do @ values.T - delta[:, None])
            scale = 1 / math.sqrt(p.head_dim)
            d_queries[row, :, group] += d_scores @ keys * scale
            result["out"].append(mixed * gate[row, :, head * p.head_dim : (head + 1) * p.head_dim])
            result["lse"].append(np.log2(total))
            result["delta"].append(delta)
            result["current_weights"].append(p_own)
            result["d_current_scores"].append(-d_scores.sum(axis=1) * scale)
            last = np.zeros((1, p.head_dim))
            result["d_summary_keys"].append(np.concatenate([d_scores.T @ q * math.log(2), last]))
            result["d_summary_values"].append(np.concatenate([weights.T @ do, last]))
    result = {n: np.stack(a).reshape(p.batch, p.num_heads, *a[0].shape) for n, a in result.items() if a}
    result["out"] = np.moveaxis(result["out"], 1, 2).reshape(p.batch, p.tokens, p.width)
    for name in ("d_summary_keys", "d_summary_values"):
        result[name] = np.moveaxis(result[name], 1, 2)
    return result | {"d_rotated_queries": d_queries}


def run(p: RatShape, x, expected, passes=(cudnn_attention.forward, cudnn_attention.backward)) -> dict[str, jax.Array]:
    """Both passes, the backward one from the true sums."""
    x = x | {name: jnp.asarray(expected[name], jnp.float32) for name in ("lse", "delta")}
    forward = jax.jit(lambda *a: passes[0](p, *a))(*(x[name] for name in FORWARD))
    backward = jax.jit(lambda *a: passes[1](p, *a))(*(x[name] for name in BACKWARD))
    return dict(zip(RESULTS, (*forward, *backward), strict=True))


def errors(found, expected) -> dict[str, float]:
    """Norm of the error over norm of the result."""
    return {
        name: float(np.linalg.norm(np.asarray(found[name], np.float64) - expected[name]))
        / np.linalg.norm(expected[name])
        for name in RESULTS
    }


def causal_scores(query, key, scale):
    key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
    scores = scale * jnp.einsum("btnh,bsnh->bnts", query, key)
    return jnp.where(jnp.tril(jnp.ones(scores.shape[2:], bool))[None, None], scores, -jnp.inf)


def plain_forward(query, key, value, *, scale):
    """What `cudnn_fmha.forward` says, with all scores at once."""
    scores = causal_scores(query, key, scale)
    value = jnp.repeat(value, query.shape[2] // value.shape[2], axis=2)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), value), jax.nn.logsumexp(scores, axis=-1)


def plain_backward(query, key, value, out, log_sum_exp, d_out, *, scale):
    """What `cudnn_fmha.backward` says, with all scores at once."""
    share = query.shape[2] // key.shape[2]
    weights = jnp.exp(causal_scores(query, key, scale) - log_sum_exp[..., None])
    wide_key, wide_value = (jnp.repeat(x, share, axis=2) for x in (key, value))
    delta = jnp.einsum("btnh,btnh->bnt", out, d_out)[..., None]
    d_scores = weights * (jnp.einsum("btnh,bsnh->bnts", d_out, wide_value) - delta)
    d_key = scale * jnp.einsum("bnts,btnh->bsnh", d_scores, query)
    d_value = jnp.einsum("bnts,btnh->bsnh", weights, d_out)
    d_key, d_value = (x.reshape(*key.shape[:3], share, -1).sum(axis=3) for x in (d_key, d_value))
    return scale * jnp.einsum("bnts,bsnh->btnh", d_scores, wide_key), d_key, d_value


@pytest.mark.parametrize("name", SHAPES)
def test_both_passes_are_the_definition(name, monkeypatch):
    monkeypatch.setattr(cudnn_fmha, "forward", plain_forward)
    monkeypatch.setattr(cudnn_fmha, "backward", plain_backward)
    p = SHAPES[name]
    x = inputs(p)
    expected = truth(p, x)
    found = run(p, x, expected)
    for result, error in errors(found, expected).items():
        assert error < 2e-6, result
    types = {n: (a.shape, a.dtype.name) for n, a in found.items()}
    assert types == {n: (expected[n].shape, "float32") for n in RESULTS}


def test_a_token_that_no_gradient_reaches(monkeypatch):
    monkeypatch.setattr(cudnn_fmha, "forward", plain_forward)
    monkeypatch.setattr(cudnn_fmha, "backward", plain_backward)
    p = SHAPES["whole"]
    x = inputs(p)
    x["d_heads"] = x["d_heads"].at[:, 7:9].set(0.0)
    found = run(p, x, truth(p, x))
    assert all(np.isfinite(array).all() for array in found.values())
    assert not np.any(found["d_rotated_queries"][:, 7:9])


def test_the_calls_stand_in_the_lowered_program():
    p = dataclasses.replace(SHAPES["partial-chunk"], dtype="bfloat16")
    assert cudnn_attention.unsupported_reason(p) is None
    x = inputs(p)
    x |= {name: x["current_scores"] for name in ("lse", "delta")}
    for function, names, target in (
        (cudnn_attention.forward, FORWARD, cudnn_fmha.FORWARD),
        (cudnn_attention.backward, BACKWARD, cudnn_fmha.BACKWARD),
    ):
        traced = jax.jit(lambda *a, function=function: function(p, *a)).trace(*(x[name] for name in names))
        assert f"@{target}(" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"segmented": True}, "it takes neither packed documents nor a state"),
        ({"continued": True}, "it takes neither packed documents nor a state"),
        ({"dtype": "float32"}, "dtype float32 is none of bfloat16, float16"),
        ({"head_dim": 100}, "head_dim 100 is no multiple of 8 up to 128; the nearest is 104"),
        ({"head_dim": 256}, "head_dim 256 is no multiple of 8 up to 128; the nearest is 128"),
        ({"capability": (7, 5)}, "it needs a card of compute capability 8.0 or later, this one has 7.5"),
        ({"tokens": 8}, "8 tokens are too few chunks with earlier ones; the least are 9"),
        ({"chunk_size": 20_000, "tokens": 100_000}, "80000 query heads are more than 65535"),
    ],
)
def test_unsupported_calls_say_why(changes, reason):
    p = dataclasses.replace(SHAPES["whole"], dtype="bfloat16")
    assert cudnn_attention.unsupported_reason(p) is None
    assert reason in cudnn_attention.unsupported_reason(dataclasses.replace(p, **changes))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "sizes",
    [(2, 640, 4, 2, 128, 16), (1, 1000, 6, 3, 64, 16), (2, 300, 2, 1, 40, 7), (1, 33, 2, 2, 64, 16)],
    ids=str,
)
def test_errs_at_most_twice_as_much_as_triton_or_two_roundoffs(sizes, dtype):
    from pallas_kernels.launch.triton import run as launch
    from pallas_kernels.rat import triton_attention, triton_attention_backward

    p = RatShape(*sizes, dtype, 10_000.0, False)
    x = inputs(p)
    expected = truth(p, x)
    unused = (jnp.zeros((1, 1), jnp.int32),) * 4

    def forward(p, *arguments):
        return launch(triton_attention.forward_launch(p), *arguments, *unused, unused[0])

    def backward(p, *arguments):
        *shared, current_scores, _ = arguments
        queries = launch(triton_attention_backward.queries_launch(p), *shared, *unused, unused[0], current_scores)
        return *queries, *launch(triton_attention_backward.summaries_launch(p), *shared, *unused)

    x |= {name: x[name].at[:, -1].set(0) for name in ("summary_keys", "summary_values")}
    triton = errors(run(p, x, expected, (forward, backward)), expected)
    # In float16 Triton comes down to the roundoff of its results, 2^-11; cuDNN also rounds each query head's dK and dV.
    least = 2**-10 if dtype == "float16" else 1e-6
    for name, error in errors(run(p, x, expected), expected).items():
        assert error <= max(2 * triton[name], least), name
