"""Every body of the RAT op against float64 loops: values and the gradient of every input, in one suite."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import triton_decode_tiling
from pallas_kernels.rat import triton_tiling
from rat_jax.ops import attention_kernels, platform, rat_kernels
from rat_jax.ops.rat import rat_mix
from rat_jax.ops.rat_types import RatState
from rat_jax.ops.recurrence import gated_recurrence
from rat_jax.ops.remat import saving_named
from rat_jax.segments import StreamState, from_segments, whole_rows
from tests import reference
from tests.equations import equations
from tests.jax_triton import require_jax_triton
from tests.pallas_kernels.rat.loop import Case, loop

PACKED = np.array([[1] * 7 + [2] * 21 + [0] * 2 + [3] * 9 + [1], [5] * 1 + [1] * 36 + [0] * 3])


def case_of(tokens, *, batch=2, heads=4, groups=2, head_dim=8, chunk=16, base=10_000.0, shift=0.0, segments=None):
    """Random inputs; `shift` moves all gates towards 0 or 1."""
    random = np.random.default_rng(tokens * 31 + chunk)
    width = heads * head_dim
    projected = random.normal(size=(batch, tokens, 3 * width + 2 * groups * head_dim)).astype(np.float32)
    projected[:, :, 2 * width : 3 * width] += shift
    layout = None if segments is None else from_segments(jnp.asarray(segments))[0]
    return Case(
        projected=projected,
        gate_bias=random.normal(size=width).astype(np.float32),
        num_groups=groups,
        chunk_size=chunk,
        rope_base=base,
        segment_ids=None if layout is None else np.array(layout.segment_ids),
        positions=None if layout is None else np.array(layout.positions),
    )


def run(case: Case, implementation, d_out, dtype=jnp.float32):
    """The op's output and its gradients, as the loop gives them."""
    batch, tokens, _, heads, _ = case.sizes
    layout = whole_rows(batch, tokens) if case.segment_ids is None else from_segments(jnp.asarray(case.segment_ids))[0]

    @jax.jit
    def both(projected, gate_bias):
        def mixed(projected, gate_bias):
            return rat_mix(
                projected,
                gate_bias,
                layout,
                num_heads=heads,
                num_groups=case.num_groups,
                chunk_size=case.chunk_size,
                rope_base=case.rope_base,
                implementation=implementation,
            ).out

        out, pull = jax.vjp(mixed, projected, gate_bias)
        return out, *pull(d_out.astype(dtype))

    interpreted = jax.default_backend() == "cpu" and implementation == "pallas_tpu"
    with pltpu.force_tpu_interpret_mode() if interpreted else contextlib.nullcontext():
        return both(jnp.asarray(case.projected, dtype), jnp.asarray(case.gate_bias))


def errors(case, implementation, dtype=jnp.float32):
    """Error of out, d_projected and d_gate_bias relative to the loop's, in the Euclidean norm, padding left out."""
    batch, tokens, width, _, _ = case.sizes
    is_token = np.ones((batch, tokens, 1)) if case.segment_ids is None else (case.segment_ids != 0)[:, :, None]
    d_out = (is_token * np.random.default_rng(0).normal(size=(batch, tokens, width))).astype(np.float32)
    truth = loop(case, d_out)
    out, *gradients = run(case, implementation, jnp.asarray(d_out), dtype)
    assert np.isfinite(out).all()
    found, expected = (is_token * out, *gradients), (is_token * truth.out, truth.d_projected, truth.d_gate_bias)
    return [
        np.linalg.norm(np.asarray(a, np.float64) - b) / (np.linalg.norm(b) + 1e-30)
        for a, b in zip(found, expected, strict=True)
    ]


CASES = {
    "one-token": case_of(1),
    "less-than-a-chunk": case_of(15),
    "one-chunk": case_of(16),
    "one-chunk-and-a-token": case_of(17),
    "odd-chunk": case_of(40, chunk=5, groups=1),
    "chunk-1": case_of(9, chunk=1),
    "odd-head-without-rotation": case_of(33, head_dim=6, base=None),
    "packed": case_of(40, chunk=4, segments=PACKED),
    "gates-near-1": case_of(40, shift=12.0),
    "gates-near-0": case_of(40, shift=-12.0),
}
# Interpreting TPU kernels takes seconds a case, and tests/pallas_kernels/rat/test_tpu.py has such cases too; whole rows
# are in the test of bfloat16 below.
SLOW = {("pallas_tpu", name) for name in CASES} - {("pallas_tpu", "packed")}
MARKS = {"xla": [], "pallas_tpu": [], "triton": [pytest.mark.gpu]}


@pytest.mark.parametrize(
    ("implementation", "case"),
    [
        pytest.param(
            implementation,
            case,
            marks=[*marks, *([pytest.mark.slow] if (implementation, name) in SLOW else [])],
            id=f"{implementation}-{name}",
        )
        for implementation, marks in MARKS.items()
        for name, case in CASES.items()
    ],
)
def test_values_and_gradients(implementation, case):
    assert max(errors(case, implementation)) < 3e-6


@pytest.mark.parametrize(  # tests/pallas_kernels/rat/test_tpu.py has quicker ones of the kernels alone
    "implementation",
    [pytest.param("pallas_tpu", marks=pytest.mark.slow), pytest.param("triton", marks=pytest.mark.gpu)],
)
def test_bfloat16_errs_at_most_twice_as_much_as_plain_xla(implementation):
    case = case_of(40, chunk=4)
    plain = errors(case, "xla", jnp.bfloat16)
    for kernel_error, plain_error in zip(errors(case, implementation, jnp.bfloat16), plain, strict=True):
        assert kernel_error < 2 * plain_error


TOKENS = [17, 31, 32, 33, 1000, 4096]
BODIES = {"triton": TOKENS, "mosaic_gpu": TOKENS, "cudnn": TOKENS[3:], None: TOKENS}  # cuDNN: see the refusals below


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [0.0, 8.0, -8.0])
@pytest.mark.parametrize(("implementation", "tokens"), [(body, tokens) for body in BODIES for tokens in BODIES[body]])
def test_bodies_for_16_bits_err_at_most_twice_as_much_as_plain_xla(implementation, tokens, shift):
    case = case_of(tokens, heads=2, groups=1, head_dim=64, shift=shift)
    plain = errors(case, "xla", jnp.bfloat16)
    for kernel_error, plain_error in zip(errors(case, implementation, jnp.bfloat16), plain, strict=True):
        assert kernel_error < 2 * plain_error


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "mosaic_gpu"])
@pytest.mark.parametrize(("tokens", "groups"), [(20, 1), (1000, 2)])
def test_heads_of_128_channels_err_at_most_twice_as_much_as_plain_xla(implementation, tokens, groups):
    """Of which `mosaic_gpu` has a backward recurrence of its own."""
    case = case_of(tokens, groups=groups, head_dim=128)
    plain = errors(case, "xla", jnp.bfloat16)
    for kernel_error, plain_error in zip(errors(case, implementation, jnp.bfloat16), plain, strict=True):
        assert kernel_error < 2 * plain_error


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "mosaic_gpu"])
@pytest.mark.parametrize("tokens", [33, 1000, 4096])
def test_packed_documents_in_16_bits_err_at_most_twice_as_much_as_plain_xla(implementation, tokens):
    """Documents of 1 to some 700 tokens, with padding between them and at both ends."""
    random = np.random.default_rng(tokens)
    segments = np.zeros((2, tokens), np.int32)
    for row in segments:
        place, number = int(random.integers(5)), 0
        while place < tokens:
            length, number = int(2 ** random.uniform(0, 9.5)), number + 1
            row[place : place + length] = number
            place += length + int(random.integers(4)) * 3
    case = case_of(tokens, heads=2, groups=1, head_dim=64, segments=segments)
    plain = errors(case, "xla", jnp.bfloat16)
    for kernel_error, plain_error in zip(errors(case, implementation, jnp.bfloat16), plain, strict=True):
        assert kernel_error < 2 * plain_error


MOSAIC = ["rat_attention_forward_mosaic", "rat_queries_backward_mosaic", "rat_summaries_backward_mosaic"]
TRITON = ["rat_attention_forward", "rat_queries_backward", "rat_summaries_backward"]
CUDNN = ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]


def gradient_of_256_tokens(implementation, packed=False, head_dim=64):
    """A jitted gradient of the op and its arguments' shapes."""
    segments = from_segments(jnp.repeat(jnp.array([[1, 2]]), 128, axis=1))[0] if packed else whole_rows(1, 256)
    sizes = {"num_heads": 2, "num_groups": 1, "chunk_size": 16, "rope_base": 10_000.0}

    def loss(projected, gate_bias):
        return jnp.sum(rat_mix(projected, gate_bias, segments, implementation=implementation, **sizes).out)

    width = 2 * head_dim
    projected = jax.ShapeDtypeStruct((1, 256, 3 * width + 2 * head_dim), jnp.bfloat16)
    return jax.jit(jax.grad(loss)), (projected, jax.ShapeDtypeStruct((width,), jnp.float32))


@pytest.mark.parametrize(
    ("implementation", "capability", "packed", "attention_kernels"),
    [
        ("triton", (9, 0), False, TRITON),
        ("mosaic_gpu", (9, 0), False, MOSAIC),
        ("mosaic_gpu", (9, 0), True, MOSAIC),
        ("cudnn", (9, 0), False, CUDNN),
        (None, (9, 0), False, MOSAIC),
        (None, (9, 0), True, MOSAIC),
        (None, (8, 0), False, TRITON),
    ],
)
def test_the_kernels_are_traced_for_a_gpu(implementation, capability, packed, attention_kernels, monkeypatch):
    require_jax_triton()
    monkeypatch.setattr(platform, "expected_platform", lambda: "gpu")
    monkeypatch.setattr(platform, "expected_capability", lambda: capability)
    gradient, arrays = gradient_of_256_tokens(implementation, packed)
    text = str(gradient.trace(*arrays).jaxpr)
    for kernel in ["rat_recurrence_forward", *attention_kernels, "rat_recurrence_backward"]:
        assert kernel in text
    assert ("_mosaic" in text) == (attention_kernels is MOSAIC)


@pytest.mark.parametrize(
    ("implementation", "head_dim", "packed", "taken"),
    [
        ("mosaic_gpu", 128, False, True),
        (None, 128, False, True),
        ("mosaic_gpu", 128, True, False),
        ("mosaic_gpu", 64, False, False),
        ("triton", 128, False, False),
        ("cudnn", 128, False, False),
    ],
)
def test_the_backward_recurrence_of_mosaic_gpu_is_that_of_whole_rows(
    implementation, head_dim, packed, taken, monkeypatch
):
    require_jax_triton()
    monkeypatch.setattr(platform, "expected_platform", lambda: "gpu")
    monkeypatch.setattr(platform, "expected_capability", lambda: (9, 0))
    gradient, arrays = gradient_of_256_tokens(implementation, packed, head_dim)
    text = str(gradient.trace(*arrays).jaxpr)
    assert ("rat_recurrence_backward_mosaic" in text) == taken


def test_a_layer_that_is_computed_again_keeps_the_places_of_documents(monkeypatch):
    triton = pytest.importorskip("pallas_kernels.rat.triton", reason="triton is installed on Linux only")
    monkeypatch.setattr(platform, "expected_platform", lambda: "gpu")
    monkeypatch.setattr(triton_tiling, "missing_dependency", lambda: None)

    def run(launch, *inputs):
        outputs = [*launch.outputs, *((inputs[i].shape, inputs[i].dtype) for i in launch.overwritten)]
        read = sum(x.sum() for x in inputs)
        return tuple(jnp.full(shape, read, dtype) for shape, dtype in outputs)

    monkeypatch.setattr(triton.launcher, "run", run)
    segments = from_segments(jnp.repeat(jnp.array([[1, 2]]), 128, axis=1))[0]
    sizes = {"num_heads": 2, "num_groups": 1, "chunk_size": 16, "rope_base": 10_000.0, "implementation": "triton"}

    def mixed(projected):
        return rat_mix(projected, jnp.zeros(128), segments, **sizes).out

    def searches(policy):
        gradient = jax.value_and_grad(lambda projected: jnp.sum(jax.checkpoint(mixed, policy=policy)(projected)))
        traced = jax.make_jaxpr(gradient)(jnp.zeros((1, 256, 3 * 128 + 2 * 64)))
        return sum(equation.primitive.name in ("cummax", "cummin") for equation in equations(traced.jaxpr))

    nothing = jax.checkpoint_policies.nothing_saveable
    assert 0 < 2 * searches(saving_named(nothing)) == searches(nothing)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("implementation", "attention_kernels"), [("triton", TRITON), ("mosaic_gpu", MOSAIC), ("cudnn", CUDNN)]
)
def test_the_kernels_stand_in_the_lowered_text(implementation, attention_kernels):
    gradient, arrays = gradient_of_256_tokens(implementation)
    text = gradient.lower(*arrays).as_text()
    for kernel in ["rat_recurrence_forward", *attention_kernels, "rat_recurrence_backward"]:
        assert kernel in text


@pytest.mark.parametrize(
    ("implementation", "capability", "dtype", "tokens", "message"),
    [
        ("mosaic_gpu", (8, 0), jnp.bfloat16, 256, r"it needs a card of compute capability 9\.0, this one has 8\.0"),
        ("mosaic_gpu", (9, 0), jnp.float32, 256, "dtype float32 is none of bfloat16, float16"),
        ("cudnn", (9, 0), jnp.float32, 256, "dtype float32"),
        ("cudnn", (9, 0), jnp.bfloat16, 32, "32 tokens are too few chunks with earlier ones; the least are 33"),
    ],
)
def test_a_named_gpu_body_says_why_it_cannot_run(implementation, capability, dtype, tokens, message, monkeypatch):
    monkeypatch.setattr(platform, "expected_capability", lambda: capability)
    sizes = {"num_heads": 2, "num_groups": 1, "chunk_size": 16, "rope_base": 10_000.0}
    projected = jnp.zeros((1, tokens, 3 * 128 + 2 * 64), dtype)
    with pytest.raises(ValueError, match=message):
        rat_mix(projected, jnp.zeros((128,)), whole_rows(1, tokens), implementation=implementation, **sizes)


@pytest.mark.gpu
def test_two_shapes_in_one_process_and_no_second_compilation():
    options = {"num_heads": 2, "num_groups": 1, "chunk_size": 4, "rope_base": 10_000.0}

    @jax.jit
    def mixed(projected, gate_bias):
        return rat_mix(projected, gate_bias, whole_rows(*projected.shape[:2]), **options).out

    for tokens in (40, 24, 40, 24):
        case = case_of(tokens, heads=2, groups=1, chunk=4)
        expected = loop(case, np.zeros((2, tokens, 16), np.float32)).out
        np.testing.assert_allclose(mixed(case.projected, case.gate_bias), expected, atol=1e-5)
    assert mixed._cache_size() == 2


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "head_dim"), [(1000, 64), (4096, 128), (1000, 256)])
def test_long_rows_on_the_gpu(tokens, head_dim):
    case = case_of(tokens, batch=1, heads=2, head_dim=head_dim)
    assert max(errors(case, "triton")) < 3e-5


RAGGED = np.array([[1] * 23 + [0] * 7 + [1] * 10, [0] * 5 + [1] * 14 + [2] * 21])  # read in calls of 30 and 10
READS = {
    "steps": (np.ones((2, 40), np.int32), [1] * 40),
    "one-call": (np.ones((2, 40), np.int32), [40]),
    "calls-and-steps": (np.ones((2, 40), np.int32), [7, 1, 1, 30, 1]),
    "packed-steps": (PACKED, [1] * 40),
    "packed-one-call": (PACKED, [40]),
    "packed-threes": (PACKED, [3] * 13 + [1]),
    "ragged-steps": (RAGGED, [1] * 40),
    "ragged-calls": (RAGGED, [30, 10]),
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("implementation", "dtype", "head_dim"),
    [("triton", jnp.float32, 8), ("triton", jnp.bfloat16, 8), ("mosaic_gpu", jnp.bfloat16, 64)],
)
@pytest.mark.parametrize("name", READS)
def test_reading_into_a_state_on_the_gpu_is_that_of_plain_xla(name, implementation, dtype, head_dim):
    segments, parts = READS[name]
    case = case_of(40, chunk=4, segments=segments, head_dim=head_dim)
    projected, gate_bias = jnp.asarray(case.projected, dtype), jnp.asarray(case.gate_bias)
    sizes = {"num_heads": 4, "num_groups": 2, "chunk_size": 4, "rope_base": 10_000.0}

    def read(implementation):
        state, end, out, start = RatState.empty(2, 40, 4, head_dim, 4, dtype), StreamState.empty(2), [], 0
        for size in parts:
            part = slice(start, start + size)
            layout, end = from_segments(jnp.asarray(segments[:, part]), end)
            mixed = rat_mix(projected[:, part], gate_bias, layout, state=state, implementation=implementation, **sizes)
            out.append(jnp.where(layout.is_token[..., None], mixed.out, 0))
            state, start = mixed.state, start + size
        return jnp.concatenate(out, axis=1), state

    with jax.default_matmul_precision("highest"):  # plain XLA's float32 products are TF32 on a GPU else
        found, expected = jax.jit(lambda: read(implementation))(), jax.jit(lambda: read("xla"))()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= (1e-6 if dtype == jnp.float32 else 1e-2) * np.linalg.norm(b)


def test_a_step_lowered_for_a_cpu_runs_plain_xla_and_can_be_differentiated(monkeypatch):
    monkeypatch.setattr(platform, "expected_platform", lambda: "gpu")
    monkeypatch.setattr(rat_kernels.Extend, "forward", lambda kernel, *arguments: (kernel.plain(*arguments), None))
    case = case_of(1)
    sizes = {"num_heads": 4, "num_groups": 2, "chunk_size": 4, "rope_base": 10_000.0}
    state = RatState.empty(2, 8, 4, 8, 4, jnp.float32)

    def out(projected, implementation):
        arguments = (projected, jnp.asarray(case.gate_bias), whole_rows(2, 1))
        return rat_mix(*arguments, state=state, implementation=implementation, **sizes).out

    found, expected = (
        jax.jit(jax.value_and_grad(lambda x, name=name: jnp.sum(out(x, name) ** 2)))(jnp.asarray(case.projected))
        for name in (None, "xla")
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("tokens", [1, 5])
def test_plain_xla_takes_no_kernel_of_attention(tokens, monkeypatch):
    def forward(kernel, *arguments):
        raise AssertionError("plain XLA asked for a kernel")

    monkeypatch.setattr(platform, "expected_platform", lambda: "gpu")
    monkeypatch.setattr(triton_decode_tiling, "missing_dependency", lambda: None)
    monkeypatch.setattr(attention_kernels.AttendOne, "forward", forward)
    case, state = case_of(tokens), RatState.empty(2, 8, 4, 8, 4, jnp.bfloat16)
    arguments = (jnp.asarray(case.projected, jnp.bfloat16), jnp.asarray(case.gate_bias), whole_rows(2, tokens))
    sizes = {"num_heads": 4, "num_groups": 2, "chunk_size": 4}
    jax.eval_shape(lambda *arrays: rat_mix(*arrays, state=state, implementation="xla", **sizes), *arguments)


def test_chunk_of_the_whole_row_is_the_rnn_with_its_output_gate():
    case = case_of(20, chunk=20)
    out = run(case, "xla", jnp.zeros((2, 20, 32)))[0]
    z, value, gate = jnp.split(jnp.asarray(case.projected[:, :, :96]), 3, axis=-1)
    states = jax.jit(gated_recurrence)(gate + case.gate_bias[None, None], value)
    np.testing.assert_allclose(out, jax.nn.sigmoid(z) * states, atol=1e-6)


def test_chunk_of_one_token_is_causal_attention_over_gated_keys_and_values():
    case = case_of(11, chunk=1)
    out = run(case, "xla", jnp.zeros((2, 11, 32)))[0]
    z, value, gate, query, key = np.split(case.projected.astype(np.float64), [32, 64, 96, 112], axis=-1)
    keep = 1 - reference.sigmoid(gate + case.gate_bias)
    query, key = (np.tile(x.reshape(2, 11, 2, 8), (1, 1, 2, 1)) for x in (query, key))
    key = key * keep.reshape(key.shape)
    attended = reference.attention(query, key, (keep * value).reshape(key.shape), rope_base=10_000.0)
    np.testing.assert_allclose(out, reference.sigmoid(z) * attended.reshape(out.shape), atol=1e-5)


def test_queries_taken_in_blocks_give_the_same(monkeypatch):
    case = case_of(40, chunk=4)
    assert max(errors(case, "xla")) < 3e-6
    monkeypatch.setattr("rat_jax.ops.attention_xla._MAX_SCORES", 1)
    monkeypatch.setattr("rat_jax.ops.attention_xla._MIN_BLOCK", 8)
    assert max(errors(case, "xla")) < 3e-6


def test_memory_of_plain_xla_grows_with_tokens_not_with_their_square():
    def bytes_held(tokens):
        projected = jax.ShapeDtypeStruct((1, tokens, 3 * 64 + 2 * 2 * 16), jnp.float32)

        def loss(projected, gate_bias):
            sizes = {"num_heads": 4, "num_groups": 2, "chunk_size": 4, "rope_base": 1e4}
            return jnp.sum(rat_mix(projected, gate_bias, whole_rows(1, tokens), **sizes).out)

        compiled = jax.jit(jax.grad(loss)).lower(projected, jax.ShapeDtypeStruct((64,), jnp.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = bytes_held(8192), bytes_held(32768)
    assert long < 4.5 * short
    assert long < 32768 * 8192 * 4  # bytes of one head's scores


def test_traced_for_a_tpu_but_lowered_for_a_cpu_plain_xla_runs(monkeypatch):
    monkeypatch.setattr(platform, "expected_platform", lambda: "tpu")
    case = case_of(40, chunk=4, segments=PACKED)
    assert max(errors(case, None)) < 3e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 514}, "heads of at most 512 channels, got 514; nearest: 512"),
        ({"state": True}, "it takes no state; implementations 'triton' and 'xla' do"),
    ],
)
def test_a_named_body_says_why_it_cannot_run_and_none_does_without_it(change, message, monkeypatch):
    head_dim = change.get("head_dim", 8)
    projected = jnp.zeros((1, 4, 3 * head_dim + 2 * head_dim))
    state = RatState.empty(1, 8, 1, head_dim, 4, jnp.float32) if "state" in change else None
    sizes = {"num_heads": 1, "num_groups": 1, "chunk_size": 4, "rope_base": 1e4, "state": state}
    arguments = (projected, jnp.zeros((head_dim,)), whole_rows(1, 4))
    with pytest.raises(ValueError, match=message):
        rat_mix(*arguments, **sizes, implementation="pallas_tpu")
    monkeypatch.setattr(platform, "expected_platform", lambda: "tpu")
    assert jax.eval_shape(lambda: rat_mix(*arguments, **sizes).out).shape == (1, 4, head_dim)


def test_wrong_channels_are_counted():
    with pytest.raises(ValueError, match=r"projected must have 3 D \+ 2 G H = 56 channels, got 50"):
        rat_mix(
            jnp.zeros((1, 4, 50)),
            jnp.zeros((16,)),
            whole_rows(1, 4),
            num_heads=4,
            num_groups=1,
            chunk_size=4,
            rope_base=None,
        )
