"""Softmax attention: blocks, windows, groups, rows that see nothing, and which body runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from pallas_kernels.attention import triton_decode_tiling
from rat_jax.mesh import BATCH_AXES, num_parts
from rat_jax.mixers.attention import Attention
from rat_jax.mixers.local_attention import LocalAttention
from rat_jax.mixers.rattention import Rattention
from rat_jax.ops import UnsupportedError, attention_kernels, attention_xla
from rat_jax.ops.attention import KeyInfo, attention
from rat_jax.segments import SegmentInfo, from_segments, whole_rows
from tests import reference
from tests.abstract_mesh import abstract_mesh
from tests.equations import equations
from tests.jax_triton import require_jax_triton

SPLASH_CALLS = ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv")
CUDNN_CALLS = ("__cudnn$fmhaSoftmax(", "__cudnn$fmhaSoftmaxBackward(")


def inputs(tokens=37, heads=4, key_heads=4, head_dim=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(tokens), 3)
    counts = (heads, key_heads, key_heads)
    return tuple(jax.random.normal(key, (2, tokens, n, head_dim), dtype) for key, n in zip(keys, counts, strict=True))


def place_of(layout):
    return KeyInfo(layout.segment_ids, layout.token_index, layout.contiguous)


def attend(query, key, value, layout=None, **options):
    """Compiled at each call: the sizes of blocks are no argument."""

    @jax.jit
    def run(query, key, value, layout):
        place = place_of(whole_rows(*query.shape[:2]) if layout is None else layout)
        return attention(query, key, value, query_info=place, key_info=place, **options)

    return run(query, key, value, layout)


@pytest.fixture(params=[False, True], ids=["at-once", "in-blocks"])
def blocks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr("rat_jax.ops.attention_xla._MAX_SCORES", 1)
        monkeypatch.setattr("rat_jax.ops.attention_xla._MIN_BLOCK", 8)


@pytest.mark.parametrize("window", [None, 0, 5, 12, 100])
@pytest.mark.parametrize("aligned", [False, True])
def test_equals_the_loop(window, aligned, blocks):
    query, key, value = inputs()
    out = attend(query, key, value, window=window, aligned=aligned).out
    np.testing.assert_allclose(out, reference.attention(query, key, value, window=window), atol=2e-6)


def test_neighbouring_query_heads_share_a_key_head(blocks):
    query, key, value = inputs(heads=6, key_heads=2)
    expected = attend(query, jnp.repeat(key, 3, axis=2), jnp.repeat(value, 3, axis=2)).out
    np.testing.assert_allclose(attend(query, key, value).out, expected, atol=1e-6)
    with pytest.raises(ValueError, match="query heads must be a multiple of key heads, got 5 and 2"):
        attend(query[:, :, :5], key, value)


def test_log_sum_exp(blocks):
    query, key, value = inputs(tokens=9)
    found = attend(query, key, value).log_sum_exp
    scores = jnp.einsum("btnh,bsnh->btns", query, key) / np.sqrt(8)
    causal = jnp.tril(jnp.ones((9, 9), bool))[None, :, None]
    np.testing.assert_allclose(found, jax.nn.logsumexp(jnp.where(causal, scores, -jnp.inf), axis=-1), atol=1e-5)


def test_padding_reads_nothing_and_has_no_gradient(blocks):
    query, key, value = inputs()
    segments = jnp.array([[0] * 5 + [1] * 20 + [0] * 12, [0] * 37])
    layout = from_segments(segments)[0]

    def loss(arguments):
        attended = attend(*arguments, layout)
        return jnp.sum(attended.out**2) + 1e-9 * jnp.sum(attended.log_sum_exp)

    assert not np.any(attend(query, key, value, layout).out[segments == 0])
    for gradient in jax.jit(jax.grad(loss))((query, key, value)):
        assert np.isfinite(gradient).all()
        np.testing.assert_allclose(gradient[segments == 0], 0.0)


def loss(arguments, layout=None, **options):
    return jnp.sum(attend(*arguments, layout, **options).out.astype(jnp.float32) ** 2)


def lowered_for_cuda(function, *arguments) -> list[bool]:
    """Whether each of cuDNN's calls stands in the program; nothing is compiled."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return [call in text for call in CUDNN_CALLS]


def lowered_for_tpu(function, *arguments) -> list[bool]:
    """As `lowered_for_cuda` of the kernels on TPU."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    return [call in text for call in SPLASH_CALLS]


@pytest.fixture
def traced_for_a_tpu(monkeypatch):
    monkeypatch.setattr("rat_jax.ops.platform.expected_platform", lambda: "tpu")


@pytest.fixture
def traced_for_a_gpu(monkeypatch):
    monkeypatch.setattr("rat_jax.ops.platform.expected_platform", lambda: "gpu")


@pytest.mark.parametrize("implementation", [None, "cudnn"])
@pytest.mark.parametrize("window", [None, 5])
def test_whole_rows_in_16_bits_lower_to_cudnn(implementation, window, traced_for_a_gpu):
    arguments = inputs(key_heads=2, dtype=jnp.bfloat16)
    options = {"window": window, "implementation": implementation}
    assert lowered_for_cuda(lambda x: attend(*x, **options).out, arguments) == [True, False]
    assert lowered_for_cuda(jax.grad(lambda x: loss(x, **options)), arguments) == [True, True]


def test_what_cudnn_does_not_take_lowers_to_plain_xla(traced_for_a_gpu):
    packed = from_segments(jnp.array([[1] * 30 + [2] * 7] * 2))[0]
    gradient = jax.grad(loss)
    assert lowered_for_cuda(gradient, inputs(dtype=jnp.bfloat16), packed) == [False, False]
    assert lowered_for_cuda(gradient, inputs(dtype=jnp.float32)) == [False, False]
    assert lowered_for_cuda(gradient, inputs(head_dim=12, dtype=jnp.bfloat16)) == [False, False]


MOSAIC_CALLS = ("rat_attention_forward_mosaic", "rat_queries_backward_mosaic", "rat_summaries_backward_mosaic")


@pytest.mark.parametrize(
    ("window", "implementation", "capability", "runs"),
    [(None, "mosaic_gpu", None, True), (5, None, (9, 0), True), (5, None, (8, 0), False), (5, None, (10, 0), False)],
)
def test_packed_documents_lower_to_mosaic_gpu_for_hopper(
    window, implementation, capability, runs, traced_for_a_gpu, monkeypatch
):
    monkeypatch.setattr("rat_jax.ops.platform.expected_capability", lambda: capability)
    packed = from_segments(jnp.array([[0] * 4 + [1] * 26 + [2] * 7] * 2))[0]
    arguments = inputs(head_dim=64, dtype=jnp.bfloat16)
    options = {"window": window, "aligned": True, "implementation": implementation}
    gradient = jax.jit(jax.grad(lambda x: loss(x, packed, **options)))
    text = gradient.trace(arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert [kernel in text for kernel in MOSAIC_CALLS] == [runs] * 3


@pytest.mark.parametrize(
    ("window", "key_heads", "mosaic"), [(None, 2, False), (1024, 2, True), (1025, 2, False), (1024, 4, False)]
)
def test_whole_rows_lower_to_cudnn_on_hopper_too_but_in_short_windows_of_shared_keys(
    window, key_heads, mosaic, traced_for_a_gpu, monkeypatch
):
    monkeypatch.setattr("rat_jax.ops.platform.expected_capability", lambda: (9, 0))
    arguments = inputs(head_dim=64, key_heads=key_heads, dtype=jnp.bfloat16)
    gradient = jax.grad(functools.partial(loss, window=window))
    assert lowered_for_cuda(gradient, arguments) == [not mosaic] * 2
    text = jax.jit(gradient).trace(arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert [kernel in text for kernel in MOSAIC_CALLS] == [mosaic] * 3


def test_mosaic_gpu_refuses_parts_of_rows(traced_for_a_gpu, monkeypatch):
    monkeypatch.setattr("rat_jax.ops.context.num_parts", lambda: 2)
    with pytest.raises(ValueError, match="'mosaic_gpu' cannot run this call: rows must not be cut along"):
        attend(*inputs(head_dim=64, dtype=jnp.bfloat16), aligned=True, implementation="mosaic_gpu")


def test_plain_xla_is_chosen_without_a_gpu():
    assert lowered_for_cuda(jax.grad(loss), inputs(dtype=jnp.bfloat16)) == [False, False]


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 5])
def test_traced_for_a_gpu_but_lowered_for_the_cpu(window, traced_for_a_gpu):
    arguments = inputs(key_heads=2, dtype=jnp.bfloat16)

    def weighted(x, **options):  # reads the log-sum-exp too, whose gradient cuDNN does not give
        attended = attend(*x, window=window, **options)
        return jnp.sum(attended.out.astype(jnp.float32) ** 2) + jnp.sum(attended.log_sum_exp**2)

    for function in (functools.partial(loss, window=window), weighted):
        found, expected = (
            jax.jit(jax.value_and_grad(functools.partial(function, implementation=implementation)))(arguments)
            for implementation in (None, "xla")
        )
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            # Two programs may round one float32 sum to neighbouring numbers of 16 bits.
            rtol = 1e-6 if a.dtype == jnp.float32 else 2**-7
            np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=rtol)


@pytest.mark.parametrize(
    ("changes", "layout", "reason"),
    [
        ({"dtype": jnp.float32}, None, "dtype float32 is none of bfloat16, float16"),
        ({"head_dim": 12}, None, "head_dim 12 is no multiple of 8 up to 128; the nearest is 16"),
        ({"tokens": 1}, None, "1 queries in a row are too few; the least are 2"),
        ({"head_dim": 136}, None, "head_dim 136 is no multiple of 8 up to 128; the nearest is 128"),
        ({}, from_segments(jnp.ones((2, 37), jnp.int32))[0], "known to be the same whole rows"),
    ],
)
def test_cudnn_by_name_runs_or_says_why_not(changes, layout, reason):
    query, key, value = inputs(**{"dtype": jnp.bfloat16} | changes)
    with pytest.raises(ValueError, match=f"implementation 'cudnn' cannot run this call: .*{reason}"):
        attend(query, key, value, layout, implementation="cudnn")


@pytest.mark.parametrize("mixer", [Attention, LocalAttention])
def test_mixers_run_cudnn_on_whole_rows_without_a_cache(mixer, traced_for_a_gpu):
    module = mixer(width=32, num_heads=4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.zeros((2, 12, 32), jnp.bfloat16)

    def mix(x, segments: SegmentInfo, memory):
        return module.mix(x, segments, memory)[0]

    packed = from_segments(jnp.ones((2, 12), jnp.int32))[0]
    assert lowered_for_cuda(mix, x, whole_rows(2, 12), None) == [True, False]
    assert lowered_for_cuda(mix, x, packed, None) == [False, False]
    assert lowered_for_cuda(mix, x, whole_rows(2, 12), module.init_memory(2, 20)) == [False, False]


PACKED = jnp.array([[0] * 4 + [1] * 20 + [2] * 10 + [0] * 3, [1] * 37])


def test_splash_attention_runs_on_tpu(traced_for_a_tpu):
    packed = from_segments(PACKED)[0]
    for dtype, layout, options in ((jnp.bfloat16, None, {}), (jnp.float32, packed, {"window": 5, "aligned": True})):
        arguments = inputs(key_heads=2, dtype=dtype)
        assert lowered_for_tpu(lambda x: loss(x, layout, **options), arguments) == [True, False, False]  # noqa: B023
        assert lowered_for_tpu(jax.grad(lambda x: loss(x, layout, **options)), arguments) == [True] * 3  # noqa: B023
    assert lowered_for_tpu(loss, inputs(dtype=jnp.bfloat16), packed) == [False] * 3  # not known to be their own keys
    assert lowered_for_tpu(loss, inputs(dtype=jnp.float16)) == [False] * 3


def test_splash_attention_by_name_runs_or_says_why_not():
    with pytest.raises(ValueError, match="'pallas_tpu' cannot run this call: keys must be known to be those of"):
        attend(*inputs(), from_segments(PACKED)[0], implementation="pallas_tpu")


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 5])
def test_splash_attention_gives_what_plain_xla_gives(window, monkeypatch):
    from pallas_kernels.attention import tpu_splash

    for name in ("forward", "backward"):
        monkeypatch.setattr(tpu_splash, name, functools.partial(getattr(tpu_splash, name), interpret=True))
    arguments, layout = inputs(key_heads=2), from_segments(PACKED)[0]

    def run(implementation):
        def weighted(x):
            attended = attend(*x, layout, window=window, aligned=True, implementation=implementation)
            return jnp.sum(attended.out**3), attended

        return jax.jit(jax.grad(weighted, has_aux=True))(arguments)

    for found, expected in zip(*(jax.tree.leaves(run(name)) for name in ("pallas_tpu", "xla")), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixer", [Attention, LocalAttention, Rattention])
def test_mixers_run_splash_attention_on_documents_without_a_cache(mixer, traced_for_a_tpu):
    module = mixer(width=32, num_heads=4, num_kv_heads=2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.zeros((2, 12, 32), jnp.bfloat16)

    def mix(x, segments: SegmentInfo, memory):
        return module.mix(x, segments, memory)[0]

    packed = from_segments(jnp.ones((2, 12), jnp.int32))[0]
    for layout in (whole_rows(2, 12), packed):
        assert lowered_for_tpu(mix, x, layout, None) == [True, False, False]
    assert lowered_for_tpu(mix, x, packed, module.init_memory(2, 20)) == [False] * 3


DECODE_KERNELS = {"attention_decode", "attention_decode_join"}


def step_inputs(num_keys=37, *, queries=1, heads=4, key_heads=2, head_dim=8, dtype=jnp.float32, is_ring=False):
    """Queries of the last tokens of two rows, of two documents each, and what a cache holds; a slot has nothing."""
    keys = jax.random.split(jax.random.key(num_keys), 3)
    sizes = ((queries, heads), (num_keys, key_heads), (num_keys, key_heads))
    arrays = tuple(jax.random.normal(key, (2, *size, head_dim), dtype) for key, size in zip(keys, sizes, strict=True))
    last = np.array([[2 * num_keys], [num_keys + 5]] if is_ring else [[num_keys - 1], [num_keys - 4]])
    slots = np.arange(num_keys)[None]
    held = last - (last - slots) % num_keys if is_ring else np.repeat(slots, 2, axis=0)
    segments = np.where(held < last - num_keys // 2, 1, 2)
    segments[:, 3] = 0
    query_index = last - np.arange(queries)[None, ::-1]
    query_info = KeyInfo(jnp.full((2, queries), 2, jnp.int32), jnp.asarray(query_index, jnp.int32))
    return (*arrays, query_info, KeyInfo(jnp.asarray(segments, jnp.int32), jnp.asarray(held, jnp.int32)))


def attend_to_cache(query, key, value, query_info, key_info, **options):
    return attention(query, key, value, query_info=query_info, key_info=key_info, **options)


def read_in_float64(query, key, value, query_info, key_info, window=None):
    """Out and log-sum-exp of one query a row, by their definitions."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    distance = np.asarray(query_info.token_index) - np.asarray(key_info.token_index)
    seen = (np.asarray(key_info.segment_ids) == np.asarray(query_info.segment_ids)) & (distance >= 0)
    if window is not None:
        seen &= distance <= window
    out, sums = np.zeros(query.shape), np.zeros(query.shape[:3])
    for b, n in np.ndindex(*query.shape[::2][:2]):
        head = n // (query.shape[2] // key.shape[2])
        scores = key[b, seen[b], head] @ query[b, 0, n] / np.sqrt(query.shape[3])
        out[b, 0, n] = reference.softmax(scores) @ value[b, seen[b], head]
        sums[b, 0, n] = np.log(np.exp(scores).sum())
    return out, sums


@pytest.mark.parametrize("is_ring", [False, True])
@pytest.mark.parametrize("window", [None, 0, 6, 36, 100])
def test_one_query_sees_no_more_of_a_cache_than_its_window(window, is_ring):
    given = step_inputs(is_ring=is_ring)
    found = jax.jit(functools.partial(attend_to_cache, window=window))(*given)
    for a, b in zip(found, read_in_float64(*given, window), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.fixture
def decode_kernels(traced_for_a_gpu, monkeypatch):
    """Shapes of the calls that take the kernel, which need not be installed."""
    shapes = []

    def forward(self, *arguments):
        shapes.append(self.shape)
        return self.plain(*arguments), None

    monkeypatch.setattr(triton_decode_tiling, "missing_dependency", lambda: None)
    monkeypatch.setattr(attention_kernels.AttendOne, "forward", forward)
    return shapes


@pytest.mark.parametrize("window", [None, 0, 6, 36, 100])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_the_kernel_is_chosen_for_one_query_and_a_cache_with_its_window(window, dtype, decode_kernels):
    jax.eval_shape(functools.partial(attend_to_cache, window=window), *step_inputs(dtype=dtype))
    assert {(shape.window, shape.own_keys) for shape in decode_kernels} == {(window, False)}


def test_the_kernel_is_not_chosen_for_several_queries_nor_own_keys_nor_float32(decode_kernels):
    jax.eval_shape(attend_to_cache, *step_inputs(queries=2, dtype=jnp.bfloat16))
    jax.eval_shape(functools.partial(attend_to_cache, implementation="xla"), *step_inputs(dtype=jnp.bfloat16))
    jax.eval_shape(attend_to_cache, *step_inputs())
    for tokens in (1, 2):
        jax.eval_shape(functools.partial(attend, aligned=True), *inputs(tokens, dtype=jnp.bfloat16))
    assert not decode_kernels


def test_the_kernel_by_name_runs_or_says_why_not(decode_kernels, monkeypatch):
    by_name = functools.partial(attend_to_cache, implementation="triton")
    assert jax.eval_shape(by_name, *step_inputs()).out.shape == (2, 1, 4, 8)
    assert decode_kernels
    reason = "'triton' cannot run this call: it takes one query a row and the keys of a cache"
    with pytest.raises(UnsupportedError, match=reason):
        by_name(*step_inputs(queries=2))
    with pytest.raises(UnsupportedError, match=reason):
        attend(*inputs(1), implementation="triton", aligned=True)
    query, *others = step_inputs()
    with pytest.raises(UnsupportedError, match="queries, keys and values differ in dtype"):
        by_name(query.astype(jnp.bfloat16), *others)
    monkeypatch.setattr("rat_jax.ops.platform.expected_platform", lambda: "cpu")
    with pytest.raises(UnsupportedError, match="it runs on NVIDIA GPUs"):
        by_name(*step_inputs())


def test_gradients_through_the_decode_kernel_are_plain(decode_kernels):
    *arrays, query_info, key_info = step_inputs(dtype=jnp.bfloat16)

    def gradients(implementation):
        def weighted(arrays):
            found = attend_to_cache(*arrays, query_info, key_info, window=6, implementation=implementation)
            return jnp.sum(found.out.astype(jnp.float32) ** 2) + jnp.sum(found.log_sum_exp**2)

        return jax.jit(jax.grad(weighted))(tuple(arrays))

    plain = gradients("xla")
    assert not decode_kernels
    for found, want in zip(gradients(None), plain, strict=True):
        np.testing.assert_array_equal(found, want)
    assert decode_kernels


@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_each_device_reads_the_caches_of_its_rows(axis, decode_kernels):
    with jax.sharding.use_abstract_mesh(abstract_mesh(**{axis: 2})):
        jax.eval_shape(attend_to_cache, *step_inputs(dtype=jnp.bfloat16))
    assert {shape.batch for shape in decode_kernels} == {1}


@pytest.mark.parametrize("window", [None, 6])
def test_a_step_is_traced_with_the_decode_kernels_and_runs_elsewhere_as_plain_xla_does(window, traced_for_a_gpu):
    require_jax_triton()
    given = step_inputs(dtype=jnp.bfloat16)
    traced = jax.jit(functools.partial(attend_to_cache, window=window)).trace(*given)
    names = {equation.params.get("name") for equation in equations(traced.jaxpr.jaxpr)}
    assert names >= DECODE_KERNELS
    found = traced.lower().compile()(*given)  # for the CPU, where plain XLA replaces them
    want = jax.jit(functools.partial(attend_to_cache, window=window, implementation="xla"))(*given)
    for a, b in zip(found, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_keys", "options", "window"),
    [
        (1000, {"key_heads": 4, "head_dim": 128}, None),  # in several parts, as there are few rows
        (513, {"heads": 16, "key_heads": 4, "head_dim": 128, "is_ring": True}, 512),
        (40, {"heads": 6, "key_heads": 2, "head_dim": 20}, 9),
        (300, {"key_heads": 4, "head_dim": 256}, None),
    ],
)
def test_the_decode_kernel_errs_at_most_twice_as_much_as_plain_xla(num_keys, options, window):
    given = step_inputs(num_keys, dtype=jnp.bfloat16, **options)
    truth = read_in_float64(*given, window)

    def errors(implementation):
        found = jax.jit(functools.partial(attend_to_cache, window=window, implementation=implementation))(*given)
        return [
            np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b) for a, b in zip(found, truth, strict=True)
        ]

    kernel, plain = errors("triton"), errors("xla")
    assert all(error <= 2 * bound + 2e-6 for error, bound in zip(kernel, plain, strict=True)), (kernel, plain)


def test_blocks_follow_the_rows_of_one_device():
    rows, sizes = 16, (16, 4096, 4096)
    alone = attention_xla.block_size(rows // 4, *sizes)
    assert attention_xla.block_size(rows, *sizes) < alone
    seen = []

    def rows_of_one(x):  # here arrays are one device's own
        seen.append((num_parts(*BATCH_AXES), attention_xla.block_size(x.shape[0], *sizes)))
        return x

    with jax.sharding.use_abstract_mesh(abstract_mesh(data=2, fsdp=2)):
        assert attention_xla.block_size(rows, *sizes) == alone
        by_rows = {"in_specs": PartitionSpec(BATCH_AXES), "out_specs": PartitionSpec(BATCH_AXES)}
        jax.eval_shape(jax.shard_map(rows_of_one, **by_rows), jax.ShapeDtypeStruct((rows,), jnp.float32))
    assert seen == [(1, alone)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("window", "tokens", "head_dim", "key_heads", "dtype"),
    [
        (None, 300, 128, 4, jnp.bfloat16),
        (None, 2, 64, 1, jnp.bfloat16),
        (0, 300, 64, 4, jnp.bfloat16),
        (5, 300, 64, 2, jnp.bfloat16),
        (100, 300, 40, 1, jnp.float16),
        (2000, 300, 128, 4, jnp.float16),
    ],
)
def test_cudnn_errs_at_most_twice_as_much_as_plain_xla(window, tokens, head_dim, key_heads, dtype):
    arguments = inputs(tokens=tokens, key_heads=key_heads, head_dim=head_dim, dtype=dtype)
    weights = jax.random.normal(jax.random.key(7), arguments[0].shape)

    def run(arguments, implementation):
        def weighted(x):
            attended = attend(*x, window=window, aligned=True, implementation=implementation)
            return jnp.sum(attended.out.astype(jnp.float32) * weights), attended

        gradients, attended = jax.jit(jax.grad(weighted, has_aux=True))(arguments)
        return *attended, *gradients

    with jax.default_matmul_precision("highest"):
        truth = run(tuple(x.astype(jnp.float32) for x in arguments), "xla")
    norms = [float(jnp.linalg.norm(x.ravel())) for x in truth]
    cudnn, plain = (
        [float(jnp.linalg.norm((a.astype(jnp.float32) - b).ravel())) for a, b in zip(found, truth, strict=True)]
        for found in (run(arguments, "cudnn"), run(arguments, "xla"))
    )
    nought = 1e-5 * max(norms)  # a window of 0 leaves queries and keys no gradient
    assert all(error <= 2 * bound + nought for error, bound in zip(cudnn, plain, strict=True)), (cudnn, plain, norms)
