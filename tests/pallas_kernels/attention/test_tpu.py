"""Splash attention in interpret mode against dense float64 sums over all pairs of tokens, and its blocks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import LocalMask, MultiHeadMask
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import process_mask, process_mask_dkv

from pallas_kernels.attention import tpu_splash, tpu_tiling
from pallas_kernels.attention.shape import AttentionShape
from rat_jax.ops import attention_xla
from rat_jax.ops.attention_types import KeyInfo
from rat_jax.segments import from_segments
from tests.pallas_kernels.attention.dense import NAMES, make_case, truth


# Interpreted kernels compile long and run short: leave out what only makes them faster.
@functools.partial(jax.jit, static_argnames=("scale", "window"), compiler_options={"xla_backend_optimization_level": 0})
def forward_and_backward(query, key, value, documents, d_out, **options):
    options |= {"interpret": True}
    out, log_sum_exp = tpu_splash.forward(query, key, value, documents, **options)
    gradients = tpu_splash.backward(query, key, value, documents, out, log_sum_exp, d_out, **options)
    return out, log_sum_exp, *gradients


def run(case, dtype=jnp.float32):
    arrays = {name: jnp.asarray(x, dtype) for name, x in zip(("query", "key", "value"), case[:3], strict=True)}
    documents, d_out = case.documents, jnp.asarray(case.d_out, dtype)
    scale = case.query.shape[-1] ** -0.5
    results = forward_and_backward(**arrays, documents=documents, d_out=d_out, scale=scale, window=case.window)
    return dict(zip(NAMES, results, strict=True))


@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 1},
        {"tokens": 300, "heads": 4, "key_heads": 2, "window": 100, "packed": True},
        pytest.param({"tokens": 270, "head_dim": 64, "packed": True}, marks=pytest.mark.slow),
        pytest.param({"tokens": 700, "heads": 2, "head_dim": 130, "window": 128}, marks=pytest.mark.slow),
        pytest.param({"tokens": 700, "heads": 6, "key_heads": 2, "window": 0}, marks=pytest.mark.slow),
        pytest.param({"tokens": 1100, "heads": 3, "key_heads": 1, "head_dim": 128}, marks=pytest.mark.slow),
        pytest.param({"tokens": 1024, "window": 5000, "packed": True}, marks=pytest.mark.slow),
        pytest.param({"tokens": 1024, "window": 512, "packed": True}, marks=pytest.mark.slow),
        pytest.param({"tokens": 1024, "window": 513, "packed": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_values_and_gradients(sizes):
    case = make_case(**sizes)
    found = run(case)
    for name, true in truth(case).items():
        assert found[name].shape == true.shape, name
        np.testing.assert_allclose(found[name], true, rtol=1e-5, atol=3e-6 * max(1.0, np.abs(true[true > -1e30]).max()))


@pytest.mark.parametrize("head_dim", [40, pytest.param(64, marks=pytest.mark.slow)])
def test_errs_at_most_twice_as_much_as_plain_xla_in_16_bits(head_dim):
    case = make_case(140, heads=2, head_dim=head_dim, window=50, packed=True, dtype=jnp.bfloat16)
    expected = truth(case)
    info = KeyInfo.of(from_segments(jnp.asarray(case.documents))[0])

    @jax.jit
    def plain(query, key, value, d_out):
        def attend(*arrays):
            return attention_xla.attend(*arrays, info, info, case.window, aligned=True)

        attended, pull = jax.vjp(attend, query, key, value)
        return *attended, *pull(attended._replace(out=d_out, log_sum_exp=jnp.zeros_like(attended.log_sum_exp)))

    arrays = (jnp.asarray(x, jnp.bfloat16) for x in (*case[:3], case.d_out))
    by_xla = dict(zip(NAMES, plain(*arrays), strict=True))
    for name, found in run(case, jnp.bfloat16).items():
        assert found.dtype == by_xla[name].dtype
        kernel, xla = (np.linalg.norm(np.asarray(x, np.float64) - expected[name]) for x in (found, by_xla[name]))
        assert kernel <= 2 * xla + 1e-6 * np.linalg.norm(expected[name]), (name, kernel, xla)


@pytest.mark.parametrize(("tokens", "window"), [(1500, None), (3000, 0), (3000, 512), (3000, 513), (5000, 1024)])
def test_steps_visit_the_blocks_that_jax_finds_by_looking_at_every_pair(tokens, window):
    block = 512
    padded = -(-tokens // block) * block
    mask = MultiHeadMask([LocalMask((padded, padded), (window, 0), 0)])
    options = {"head_shards": 1, "q_seq_shards": 1}

    def visits(reads, runs):  # by block of queries or of keys
        return [sorted(read[run != 0]) for read, run in zip(reads, runs, strict=True)]

    steps = tpu_tiling.steps_of_queries(tokens, window, block)
    info, _ = process_mask(mask, (block, block), **options)
    assert steps.reads.shape == info.data_next.shape
    assert visits(steps.reads[0], steps.runs[0]) == visits(info.data_next[0], info.block_mask[0])
    steps = tpu_tiling.steps_of_keys(tokens, window, block)
    info, _ = process_mask_dkv(mask, (block, block), **options)
    assert steps.reads.shape == info.data_next.shape
    assert visits(steps.reads[0].T, steps.runs[0].T) == visits(info.data_next[0].T, info.block_mask[0].T)


def test_blocks_pad_little():
    sizes = {1: 128, 128: 128, 300: 128, 470: 512, 512: 512, 600: 128, 700: 256, 1100: 128, 4096: 512, 4100: 512}
    assert {tokens: tpu_tiling.block_size(tokens) for tokens in sizes} == sizes


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dtype": "float16"}, "dtype float16 is none of bfloat16, float32; nearest: float32"),
        ({"head_dim": 300}, "nearest: 256"),
        ({"own_keys": False}, "the queries' own tokens, in their order: no cache"),
        ({"tokens": 300_000, "window": None}, "rows of 300000 tokens; nearest: 262144 tokens"),
        ({"tokens": 2_000_000}, "nearest: 1048576 tokens"),
        ({"tokens": 1_000_000, "window": 128_000}, "nearest: 524288 tokens"),
    ],
)
def test_unsupported_calls_say_why(changes, text):
    shape = AttentionShape(3, 1_000_000, 4, 2, 16, "float32", window=1024)
    assert tpu_tiling.unsupported_reason(shape) is None
    assert text in tpu_tiling.unsupported_reason(dataclasses.replace(shape, **changes))
