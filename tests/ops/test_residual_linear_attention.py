"""Residual linear attention against the recordings and the loop: windows, documents, blocks, memory."""

import contextlib
import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from rat_jax.ops import platform
from rat_jax.ops.attention import KeyInfo, attention
from rat_jax.ops.residual_linear_attention import residual_linear_attention
from rat_jax.segments import whole_rows
from tests import reference
from tests.jax_triton import require_jax_triton

FOLDER = pathlib.Path(__file__).parent.parent / "testdata"


@pytest.fixture
def blocks(monkeypatch):
    """Rows of 37 tokens take several blocks and several steps."""
    monkeypatch.setattr("rat_jax.ops.linear_attention_xla._BLOCK", 8)
    monkeypatch.setattr("rat_jax.ops.linear_attention_xla._STEP_BLOCKS", 2)


def inputs(tokens=37, heads=4, key_heads=2, head_dim=8, dtype=jnp.float32, rows=2):
    keys = jax.random.split(jax.random.key(tokens), 3)
    counts = (heads, key_heads, key_heads)
    return tuple(
        jax.random.normal(key, (rows, tokens, n, head_dim), dtype) for key, n in zip(keys, counts, strict=True)
    )


def attend(*arguments, initial_state=None, **options):
    """Compiled at each call: the sizes of blocks are no argument."""
    run = jax.jit(lambda arguments, state: residual_linear_attention(*arguments, initial_state=state, **options))
    return run(arguments, initial_state)


def initial(rows, heads, head_dim=8):
    return jax.random.normal(jax.random.key(5), (rows, heads, 2 * head_dim, head_dim))


def close(found, want, tolerance=1e-5):
    assert np.abs(np.asarray(found) - want).max() <= tolerance * max(1e-6, np.abs(want).max())


@pytest.mark.parametrize(
    ("implementation", "feature_map"),
    [
        pytest.param(implementation, feature_map, id=f"{feature_map}-{implementation}", marks=marks)
        for implementation, feature_map, marks in [
            ("xla", "softmax", []),
            ("xla", "relu", []),
            ("pallas_tpu", "softmax", []),
            ("pallas_tpu", "relu", pytest.mark.slow),  # the kernels' relu is in their own tests
            ("triton", "softmax", pytest.mark.gpu),
            ("triton", "relu", pytest.mark.gpu),
        ]
    ],
)
def test_equals_the_recordings(feature_map, implementation):
    with np.load(FOLDER / f"rla_{feature_map}.npz") as file:
        arrays = dict(file)
    window = int(arrays["window_size"])

    def run(query, key, value, initial_state):
        return residual_linear_attention(
            query,
            key,
            value,
            window=window,
            feature_map=feature_map,
            initial_state=initial_state,
            implementation=implementation,
        )

    arguments = [jnp.asarray(arrays[name]) for name in ("q", "k", "v", "initial_state")]

    @jax.jit
    def run_and_pull_back(arguments, d_out):
        attended, pull_back = jax.vjp(run, *arguments)
        return attended, pull_back(attended._replace(out=d_out, final_state=jnp.zeros_like(attended.final_state)))

    with pltpu.force_tpu_interpret_mode() if implementation == "pallas_tpu" else contextlib.nullcontext():
        attended, gradients = run_and_pull_back(arguments, arrays["do"])
    names = ("dq", "dk", "dv", "dinitial_state")
    for found, name in zip((*attended, *gradients), ("out", "final_state", *names), strict=True):
        assert found.shape == arrays[name].shape
        close(found, arrays[name], 1e-4)


@pytest.mark.parametrize(
    ("implementation", "feature_map"),
    [
        # These are in tests/pallas_kernels/linear_attention too.
        *(pytest.param("pallas_tpu", feature_map, marks=pytest.mark.slow) for feature_map in ("softmax", "relu")),
        *(
            pytest.param(name, feature_map, marks=pytest.mark.gpu)
            for name in ("triton", "mosaic_gpu")
            for feature_map in ("softmax", "relu")
        ),
    ],
)
def test_kernels_in_bfloat16_err_at_most_twice_as_much_as_plain_xla(implementation, feature_map):
    head_dim = 64 if implementation == "mosaic_gpu" else 32
    arrays = list(inputs(tokens=150, head_dim=head_dim, dtype=jnp.bfloat16))
    if implementation != "mosaic_gpu":
        arrays.append(initial(1, 2, head_dim=head_dim))
    d_out = jax.random.normal(jax.random.key(9), arrays[0].shape, jnp.bfloat16)

    def results(implementation, dtype):
        def run(query, key, value, state=None):
            options = {"window": 5, "feature_map": feature_map, "implementation": implementation}
            return residual_linear_attention(query, key, value, initial_state=state, **options)

        @jax.jit
        def both(arrays, d_out):
            attended, pull_back = jax.vjp(run, *arrays)
            return *attended, *pull_back(attended._replace(out=d_out, final_state=attended.final_state))

        return both([*(x.astype(dtype) for x in arrays[:3]), *arrays[3:]], d_out.astype(dtype))

    with jax.default_matmul_precision("highest"):
        expected = results("xla", jnp.float32)
    with pltpu.force_tpu_interpret_mode() if implementation == "pallas_tpu" else contextlib.nullcontext():
        found = results(implementation, jnp.bfloat16)
    for want, kernel, plain in zip(expected, found, results("xla", jnp.bfloat16), strict=True):
        want, kernel, plain = (np.asarray(x, np.float64) for x in (want, kernel, plain))
        assert np.linalg.norm(kernel - want) <= 2 * np.linalg.norm(plain - want)


def trace_for(monkeypatch, kernel):
    """Programs are traced as for devices whose fastest kernel it is."""
    found = {"triton": ("gpu", (8, 0)), "mosaic_gpu": ("gpu", (9, 0)), "pallas_tpu": ("tpu", None)}[kernel]
    monkeypatch.setattr(platform, "expected_platform", lambda: found[0])
    monkeypatch.setattr(platform, "expected_capability", lambda: found[1])


def test_the_triton_kernels_are_traced_for_a_gpu(monkeypatch):
    require_jax_triton()
    trace_for(monkeypatch, "triton")

    def loss(arrays):
        return jnp.sum(residual_linear_attention(*arrays, window=5).out)

    text = str(jax.make_jaxpr(jax.grad(loss))(inputs()))
    for kernel in ("totals", "scan", "states", "outputs", "keys", "queries"):
        assert f"linear_attention_{kernel}" in text


def test_on_hopper_the_mosaic_gpu_kernels_run_forward_and_backward(monkeypatch):
    trace_for(monkeypatch, "mosaic_gpu")
    # jax-triton 0.3 cannot be imported without a GPU, so that what Mosaic does not take shall not go to Triton.
    monkeypatch.setattr("pallas_kernels.linear_attention.triton_tiling.missing_dependency", lambda: "not installed")

    def lowered(**options):
        arrays = inputs(head_dim=64, dtype=jnp.bfloat16)
        loss = jax.value_and_grad(lambda x: jnp.sum(residual_linear_attention(*x, window=5, **options).out))
        return jax.jit(loss).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()

    text = lowered()
    assert all(f"linear_attention_{kernel}_mosaic" in text for kernel in ("sums", "outputs", "keys", "queries"))
    for refused in ({"segment_ids": jnp.ones((2, 37), jnp.int32)}, {"initial_state": initial(1, 2, head_dim=64)}):
        assert "mosaic" not in lowered(**refused)


def test_packed_documents_are_refused_by_the_name_of_mosaic_gpu():
    with pytest.raises(ValueError, match="neither packed documents nor an initial state; implementation 'triton' does"):
        residual_linear_attention(
            *inputs(head_dim=64, dtype=jnp.bfloat16),
            window=5,
            segment_ids=jnp.ones((2, 37), jnp.int32),
            implementation="mosaic_gpu",
        )


@pytest.mark.parametrize("kernel", ["pallas_tpu", pytest.param("mosaic_gpu", marks=pytest.mark.slow)])
def test_traced_for_a_kernel_but_lowered_for_a_cpu_plain_xla_runs(kernel, monkeypatch):
    whole = kernel == "mosaic_gpu"
    arrays = inputs(head_dim=64, dtype=jnp.bfloat16) if whole else inputs()
    segments = None if whole else jnp.asarray(np.repeat([[1] * 20 + [2] * 17], 2, axis=0))
    state = None if whole else initial(1, 2)

    def gradients():
        def loss(arrays, state):
            attended = residual_linear_attention(*arrays, window=5, initial_state=state, segment_ids=segments)
            return jnp.sum(attended.out.astype(jnp.float32) ** 2) + jnp.sum(attended.final_state**2)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(arrays, state)

    expected = gradients()
    trace_for(monkeypatch, kernel)
    jax.tree.map(lambda found, want: close(found, np.asarray(want)), gradients(), expected)


@pytest.mark.parametrize(
    ("window", "feature_map", "sizes"),
    [
        (0, "softmax", {}),
        (5, "relu", {"heads": 3, "key_heads": 1}),
        (7, "softmax", {"heads": 2, "head_dim": 4, "tokens": 16}),
        (35, "softmax", {}),
        (5, "softmax", {"tokens": 1}),
    ],
)
def test_equals_the_loop(window, feature_map, sizes, blocks):
    query, key, value = inputs(**sizes)
    heads, head_dim = query.shape[2:]
    state = initial(2, heads, head_dim)
    attended = attend(query, key, value, window=window, feature_map=feature_map, initial_state=state)
    out, final = reference.residual_linear_attention(query, key, value, state, window, feature_map)
    close(attended.out, out)
    close(attended.final_state, final)


@pytest.mark.parametrize("shape", [None, (1, 2), (2, 2), (1, 4)], ids=str)
def test_initial_states_of_every_shape(shape):
    query, key, value = inputs()
    state = None if shape is None else initial(*shape)
    whole = (
        jnp.zeros((2, 4, 16, 8))
        if state is None
        else jnp.broadcast_to(jnp.repeat(state, 4 // shape[1], 1), (2, 4, 16, 8))
    )
    attended = attend(query, key, value, window=5, initial_state=state)
    out, final = reference.residual_linear_attention(query, key, value, whole, 5)
    close(attended.out, out)
    close(attended.final_state, final[:, :: 1 if attended.final_state.shape[1] == 4 else 2])
    assert attended.final_state.shape[1] == (2 if shape is None else shape[1])


@pytest.mark.parametrize("window", [36, 100])
def test_windows_as_long_as_the_row_leave_nothing(window):
    arguments = inputs()
    attended = attend(*arguments, window=window)
    assert not np.any(attended.out)
    assert not np.any(attended.final_state)
    gradients = jax.jit(jax.grad(lambda x: jnp.sum(residual_linear_attention(*x, window=window).out ** 2)))(arguments)
    assert not any(np.any(gradient) for gradient in gradients)


SEGMENTS = [
    [1] * 3 + [2] * 17 + [0] * 2 + [1] * 15,
    [0] * 5 + [4] * 1 + [2] * 7 + [4] * 20 + [0] * 4,
    [3] * 37,
    [0] * 37,
]


def documents(row):
    """First token and end of each document of a row."""
    edges = [0, *(np.flatnonzero(np.diff(SEGMENTS[row])) + 1), 37]
    return [(a, b) for a, b in itertools.pairwise(edges) if SEGMENTS[row][a]]


@pytest.mark.parametrize("window", [0, pytest.param(4, marks=pytest.mark.slow), 10])
def test_packed_documents_equal_each_alone(window, blocks):
    arguments, segments, state = inputs(rows=4), jnp.array(SEGMENTS), initial(4, 4)
    weights = jax.random.normal(jax.random.key(3), arguments[0].shape) * (segments != 0)[..., None, None]

    def weighted(arguments, state):
        attended = residual_linear_attention(*arguments, window=window, initial_state=state, segment_ids=segments)
        return jnp.sum(attended.out * weights), attended

    gradients, packed = jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))(arguments, state)
    visible = np.zeros((4, 1, 37, 37), bool)
    for row in range(4):
        final = state[row]
        for a, b in documents(row):
            part = [x[row : row + 1, a:b] for x in arguments]
            out, final = reference.residual_linear_attention(*part, state[row : row + 1], window)
            close(packed.out[row, a:b], out[0])
            visible[row, 0, a:b, a:b], final = np.tril(np.ones((b - a, b - a)), -window - 1), final[0]
        close(packed.final_state[row], final)

    def dense(arguments, state):
        query, key = (jnp.concatenate([jax.nn.softmax(x), jax.nn.softmax(-x)], axis=-1) for x in arguments[:2])
        key, value = (jnp.repeat(x, 2, axis=2) for x in (key, arguments[2]))
        scores = jnp.einsum("btnf,bsnf->bnts", query, key) * visible
        out = jnp.einsum("bnts,bsnh->btnh", scores, value) + jnp.einsum("btnf,bnfh->btnh", query, state)
        return jnp.sum(out * weights)

    for found, want in zip(
        jax.tree.leaves(gradients),
        jax.tree.leaves(jax.jit(jax.grad(dense, argnums=(0, 1)))(arguments, state)),
        strict=True,
    ):
        close(found, np.asarray(want))


@pytest.mark.parametrize("window", [0, 1, 5, 36])
def test_each_past_token_is_read_by_one_branch(window):
    query, key, value = inputs(rows=1)
    layout = whole_rows(1, 37)
    place = KeyInfo(layout.segment_ids, layout.token_index)

    @jax.jit
    def branches(value):
        local = attention(query, key, value, query_info=place, key_info=place, window=window)
        return local.out, residual_linear_attention(query, key, value, window=window).out

    before = branches(value)
    for at in range(37):
        local, linear = (
            np.any(np.abs(a - b)[0] > 1e-7, axis=(1, 2))
            for a, b in zip(branches(value.at[:, at].add(3.0)), before, strict=True)
        )
        distance = np.arange(37) - at
        np.testing.assert_array_equal(local, (distance >= 0) & (distance <= window))
        np.testing.assert_array_equal(linear, distance > window)


@pytest.mark.parametrize("tokens", [1, 300])
def test_bfloat16_keeps_a_float32_state(tokens):
    exact = inputs(tokens=tokens)
    want = attend(*exact, window=3, initial_state=initial(1, 2))
    rounded = (x.astype(jnp.bfloat16) for x in exact)
    found = attend(*rounded, window=3, initial_state=initial(1, 2))
    assert found.out.dtype == jnp.bfloat16
    assert found.final_state.dtype == jnp.float32
    for a, b in zip(found, want, strict=True):
        assert np.linalg.norm(np.float32(a) - b) < 1e-2 * np.linalg.norm(b)


def test_memory_grows_with_the_number_of_tokens():
    @functools.partial(jax.jit, static_argnames="window")
    def gradient(arguments, window):
        return jax.grad(lambda x: jnp.sum(residual_linear_attention(*x, window=window).out ** 2))(arguments)

    def temporary_bytes(tokens):
        shapes = jax.eval_shape(lambda: inputs(tokens=tokens, head_dim=32))
        return gradient.lower(shapes, window=64).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(1 << 14), temporary_bytes(1 << 15)
    assert large < 2.1 * small
    assert large < 12 * sum(x.size * 4 for x in jax.eval_shape(lambda: inputs(tokens=1 << 15, head_dim=32)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": -1}, "window must be a whole number of 0 or more, got -1"),
        ({"feature_map": "exp"}, "feature_map must be 'softmax' or 'relu', got 'exp'"),
        ({"initial_state": jnp.zeros((1, 3, 16, 8))}, r"initial_state must be \(2 or 1, 4 or 2, 16, 8\), got \(1, 3"),
        ({"implementation": "cudnn"}, "implementation must be one of xla, triton, mosaic_gpu, pallas_tpu, got 'cudnn'"),
    ],
)
def test_what_cannot_be_computed_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        residual_linear_attention(*inputs(), **({"window": 3} | changes))
    query, key, value = inputs()
    with pytest.raises(ValueError, match="query heads must be a multiple of key heads, got 3 and 2"):
        residual_linear_attention(query[:, :, :3], key, value, window=3)
