"""The gated delta rule against the loop and the recordings: chunks, documents, states, gradients, extreme gates."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_delta_rule import triton_tiling
from rat_jax.ops import UnsupportedError, gated_delta_rule, gated_delta_rule_kernels, gated_delta_rule_xla, platform
from rat_jax.ops.remat import saving_named
from rat_jax.segments import StreamState, from_segments
from tests import reference
from tests.abstract_mesh import abstract_mesh
from tests.jax_triton import require_jax_triton
from tests.ops.devices import trace_for
from tests.ops.steps import going_on, relative_errors

RECORDED = pathlib.Path(__file__).parent.parent / "testdata" / "gated_delta_net.npz"
NAMES = ("query", "key", "value", "log_decay", "write_strength", "initial_state")


@pytest.fixture
def small_groups(monkeypatch):
    """Rows of 2 x 37 tokens take several groups, the last of them with padding."""
    monkeypatch.setattr(gated_delta_rule_xla, "_GROUP_TOKENS", 32)


def inputs(tokens=37, *, rows=2, heads=2, key_dim=4, value_dim=6):
    """By name, with keys of length 1 and gates as layers have them: what layers pass, in float32."""
    draw = np.random.default_rng(0)
    key = draw.normal(size=(rows, tokens, heads, key_dim))
    arrays = (
        draw.normal(size=(rows, tokens, heads, key_dim)),
        key / np.linalg.norm(key, axis=-1, keepdims=True),
        draw.normal(size=(rows, tokens, heads, value_dim)),
        -np.exp(draw.normal(size=(rows, tokens, heads)) - 2),
        draw.uniform(size=(rows, tokens, heads)),
        draw.normal(size=(rows, heads, key_dim, value_dim)),
    )
    return {name: x.astype(np.float32) for name, x in zip(NAMES, arrays, strict=True)}


@functools.partial(jax.jit, static_argnames="chunk_size")
def run(arrays, segment_ids=None, chunk_size=8):
    return gated_delta_rule(**arrays, segment_ids=segment_ids, chunk_size=chunk_size)


def loop(arrays):
    return reference.gated_delta_rule(**arrays)


def by_steps(arrays, segment_ids=None):
    """The same in JAX, token by token, to be differentiated: products of states in the dtype of what they meet."""
    arrays = {"initial_state": jnp.zeros(arrays["key"].shape[:1] + arrays["key"].shape[2:] + (6,))} | arrays
    ids = jnp.ones(arrays["key"].shape[:2], jnp.int32) if segment_ids is None else segment_ids
    goes_on = jnp.concatenate([jnp.ones_like(ids[:, :1]), ids[:, 1:] == ids[:, :-1]], axis=1) | (ids == 0)
    is_token = (ids != 0)[..., None]
    kept = jnp.where(is_token, jnp.exp(arrays["log_decay"]) * goes_on[..., None], 1.0)
    strength = jnp.where(is_token, arrays["write_strength"], 0.0)

    def step(state, token):
        query, key, value, kept, strength = token
        state = kept[..., None, None] * state
        held = jnp.einsum("bnkv,bnk->bnv", state.astype(key.dtype), key, preferred_element_type=jnp.float32)
        correction = strength[..., None] * (value - held)
        state += jnp.einsum("bnk,bnv->bnkv", key, correction.astype(key.dtype), preferred_element_type=jnp.float32)
        out = jnp.einsum("bnkv,bnk->bnv", state.astype(key.dtype), query, preferred_element_type=jnp.float32)
        return state, out.astype(value.dtype)

    tokens = [jnp.moveaxis(x, 1, 0) for x in (*(arrays[name] for name in NAMES[:3]), kept, strength)]
    state, out = jax.lax.scan(step, arrays["initial_state"], tokens)
    return jnp.moveaxis(out, 0, 1), state


def part(arrays, first, end, row=None):
    """Tokens first .. end - 1 of all rows or of one; with the initial state."""
    rows = slice(None) if row is None else slice(row, row + 1)
    return {name: x[rows] if name == "initial_state" else x[rows, first:end] for name, x in arrays.items()}


def close(found, want, tolerance=1e-5):
    assert found.shape == want.shape
    assert np.abs(np.asarray(found, np.float64) - want).max() <= tolerance * max(1e-6, np.abs(want).max())


def test_equals_the_recording():
    with np.load(RECORDED) as file:
        recorded = {name.removeprefix("op/"): file[name] for name in file.files if name.startswith("op/")}

    @jax.jit
    def run_and_pull_back(arrays, d_out, d_final_state):
        results, pull_back = jax.vjp(lambda arrays: tuple(gated_delta_rule(**arrays)), arrays)
        return *results, pull_back((d_out, d_final_state))[0]

    arrays = {name: jnp.asarray(recorded[name]) for name in NAMES}
    out, final_state, gradients = run_and_pull_back(arrays, recorded["d_out"], recorded["d_final_state"])
    close(out, recorded["out"])
    close(final_state, recorded["final_state"])
    for name in NAMES:
        close(gradients[name], recorded[f"d_{name}"])


@pytest.mark.parametrize(
    ("sizes", "chunk_size"),
    [
        ({"tokens": 1}, 8),
        ({"tokens": 7}, 8),
        ({"tokens": 32, "heads": 1}, 8),
        ({"tokens": 37}, 16),
        ({"tokens": 37, "key_dim": 6, "value_dim": 4}, 5),
        ({"tokens": 37, "key_dim": 4, "value_dim": 4, "rows": 1}, 1),
        ({"tokens": 70, "value_dim": 8}, 64),
    ],
    ids=str,
)
def test_equals_the_loop(sizes, chunk_size, small_groups):
    arrays = inputs(**sizes)
    for found, want in zip(run(arrays, chunk_size=chunk_size), loop(arrays), strict=True):
        close(found, want)


@pytest.mark.parametrize("tokens", [1, 13])
def test_gradients_of_every_input_are_the_slopes_of_the_loop(tokens, small_groups):
    arrays = inputs(tokens, rows=1)
    weights = [np.random.default_rng(0).normal(size=x.shape) for x in loop(arrays)]

    def loss(arrays):
        results = gated_delta_rule(**arrays, chunk_size=4)
        return sum(jnp.sum(x * jnp.asarray(weight, jnp.float32)) for x, weight in zip(results, weights, strict=True))

    gradients = jax.jit(jax.grad(loss))(arrays)
    exact = {name: np.array(x, np.float64) for name, x in arrays.items()}
    for name, array in exact.items():
        slopes = np.empty_like(array)
        for index in np.ndindex(array.shape):
            here, losses = array[index], []
            for step in (1e-5, -1e-5):
                array[index] = here + step
                losses.append(sum(np.sum(x * weight) for x, weight in zip(loop(exact), weights, strict=True)))
            array[index] = here
            slopes[index] = (losses[0] - losses[1]) / 2e-5
        close(gradients[name], slopes)


SEGMENTS = np.array(
    [
        [1] * 3 + [2] * 17 + [0] * 2 + [1] * 15,
        [0] * 5 + [4] * 1 + [2] * 7 + [4] * 20 + [0] * 4,
        [3] * 37,
        [0] * 37,
    ]
)


def documents(row):
    """First token and end of each document of a row."""
    edges = [0, *(np.flatnonzero(np.diff(SEGMENTS[row])) + 1), 37]
    return [(a, b) for a, b in itertools.pairwise(edges) if SEGMENTS[row][a]]


def test_packed_documents_equal_each_alone_in_values_and_gradients(small_groups):
    arrays = inputs(rows=4)
    del arrays["initial_state"]
    weights = jax.random.normal(jax.random.key(3), arrays["value"].shape) * (SEGMENTS != 0)[..., None, None]

    def loss(function, arrays):
        out, final_state = function(arrays, segment_ids=jnp.asarray(SEGMENTS))
        return jnp.sum(out * weights) + jnp.sum(final_state), (out, final_state)

    def chunked(arrays, segment_ids):
        return gated_delta_rule(**arrays, segment_ids=segment_ids, chunk_size=8)

    gradients, (out, final_state) = jax.jit(jax.grad(functools.partial(loss, chunked), has_aux=True))(arrays)
    wanted, _ = jax.jit(jax.grad(functools.partial(loss, by_steps), has_aux=True))(arrays)
    for name, found in gradients.items():
        close(found, wanted[name])
    assert np.all(np.isfinite(out))
    for row in range(4):
        last_state = np.zeros(final_state.shape[1:])
        for a, b in documents(row):
            alone, last_state = (x[0] for x in loop(part(arrays, a, b, row)))
            close(out[row, a:b], alone)
        close(final_state[row], last_state)


def test_padding_is_the_identity_whatever_it_holds(small_groups):
    arrays = inputs()
    is_token = np.ones((2, 37), bool)
    is_token[0, 20:] = False
    is_token[1, :9] = False

    def loss(arrays):
        results = gated_delta_rule(**arrays, segment_ids=from_segments(jnp.int32(is_token), ended())[0], chunk_size=8)
        return jnp.sum(results.out**2 * is_token[..., None, None]), results

    def ended():  # rows stopped within document 1, 5 tokens ago
        ones = jnp.ones((2,), jnp.int32)
        return StreamState(segment_id=ones, num_documents=ones, position=5 * ones, num_tokens=5 * ones)

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    gradients, results = gradient(arrays)
    for row, (a, b) in enumerate([(0, 20), (9, 37)]):
        out, final_state = loop(part(arrays, a, b, row))
        close(results.out[row, a:b], out[0])
        close(results.final_state[row], final_state[0])
    changed = {
        name: x if name == "initial_state" else np.where(is_token[(..., *[None] * (x.ndim - 2))], x, np.float32(100))
        for name, x in arrays.items()
    }
    changed_gradients, changed_results = gradient(changed)
    np.testing.assert_array_equal(results.final_state, changed_results.final_state)
    np.testing.assert_array_equal(results.out[is_token], changed_results.out[is_token])
    assert np.all(np.isfinite(changed_results.out))
    for name, found in changed_gradients.items():
        np.testing.assert_array_equal(found, gradients[name])
        if name != "initial_state":
            assert not np.any(found[~is_token])


@functools.partial(jax.jit, static_argnames="chunk_size")
def go_on(arrays, segment_ids, end, state, chunk_size=8):
    """One call of a row that stands where `end` and `state` say."""
    segments, end = from_segments(segment_ids, end)
    arrays = arrays | {"initial_state": state}
    return gated_delta_rule(**arrays, segment_ids=segments, chunk_size=chunk_size), end


CUT_SEGMENTS = np.array([[1] * 19, [1] * 6 + [0] * 3 + [2] * 10])


@pytest.fixture(scope="module")
def whole():
    """Inputs without a state, and what one call makes of them."""
    arrays = inputs(19)
    del arrays["initial_state"]
    return arrays, run(arrays, jnp.asarray(CUT_SEGMENTS))


def test_a_row_cut_at_every_offset_goes_on_from_its_state(whole):
    """Both parts are padded to one length, at their end and at their start, so that one program runs them all."""
    arrays, (whole_out, whole_state) = whole
    is_token = CUT_SEGMENTS != 0
    for cut in range(1, 19):
        end, state, outs = StreamState.empty(2), np.zeros(whole_state.shape, np.float32), []
        for first, last, padding in ((0, cut, (0, 19 - cut)), (cut, 19, (cut, 0))):
            padded = {
                name: np.pad(x[:, first:last], [(0, 0), padding, *[(0, 0)] * (x.ndim - 2)])
                for name, x in arrays.items()
            }
            ids = np.pad(CUT_SEGMENTS[:, first:last], [(0, 0), padding])
            (out, state), end = go_on(padded, ids, end, state)
            outs.append(np.asarray(out)[:, padding[0] : 19 - padding[1]])
        close(np.concatenate(outs, axis=1)[is_token], np.asarray(whole_out)[is_token], 3e-6)
        close(state, np.asarray(whole_state), 3e-6)


def test_a_row_of_single_tokens_goes_on_from_its_state(whole):
    arrays, (whole_out, whole_state) = whole
    is_token = CUT_SEGMENTS != 0
    end, state, outs = StreamState.empty(2), np.zeros(whole_state.shape, np.float32), []
    for t in range(19):
        (out, state), end = go_on(part(arrays, t, t + 1), CUT_SEGMENTS[:, t : t + 1], end, state)
        outs.append(np.asarray(out))
    close(np.concatenate(outs, axis=1)[is_token], np.asarray(whole_out)[is_token], 3e-6)
    close(state, np.asarray(whole_state), 3e-6)


@jax.jit
@functools.partial(jax.grad, has_aux=True)
def squares_and_slopes(arrays):
    results = gated_delta_rule(**arrays, chunk_size=16)
    return jnp.sum(results.out**2) + jnp.sum(results.final_state**2), results


@pytest.mark.parametrize("log_decay", [0.0, -50.0, "mixed", -np.inf])
@pytest.mark.parametrize("write_strength", [0.0, 1.0, 2.0])
def test_extreme_gates(log_decay, write_strength):
    arrays = inputs(40)
    shape = arrays["log_decay"].shape
    if log_decay == "mixed":  # small decays after large ones keep their digits
        forgets = np.random.default_rng(1).uniform(size=shape) < 0.3
        arrays["log_decay"] = np.where(forgets, np.float32(-1e3), arrays["log_decay"])
    else:
        arrays["log_decay"] = np.full(shape, log_decay, np.float32)
    arrays["write_strength"] = np.full(shape, write_strength, np.float32)

    gradients, results = squares_and_slopes(arrays)
    for found, want in zip(results, loop(arrays), strict=True):
        close(found, want)
    assert all(np.all(np.isfinite(x)) for x in gradients.values())
    if write_strength:
        assert np.any(gradients["value"])


def test_one_key_written_again_and_again_loses_no_digits():
    """A chunk of equal keys makes a triangular system whose powers are beyond float32."""
    arrays = inputs(64)
    arrays["key"] = np.broadcast_to(arrays["key"][:, :1], arrays["key"].shape)
    arrays["log_decay"] = np.zeros_like(arrays["log_decay"])
    for write_strength in (1.0, 2.0):
        arrays["write_strength"] = np.full_like(arrays["log_decay"], write_strength)
        for found, want in zip(run(arrays, chunk_size=64), loop(arrays), strict=True):
            close(found, want, 2e-5)


def test_no_token_reads_a_later_one(small_groups):
    arrays = inputs(21, rows=1, heads=1)
    segments = jnp.asarray([[1] * 4 + [2] * 17])

    def out(arrays):
        return jnp.sum(gated_delta_rule(**arrays, segment_ids=segments, chunk_size=8).out, axis=(0, 2, 3))

    del arrays["initial_state"]
    slopes = jax.jit(jax.jacrev(out))(arrays)
    reads = np.tril(np.ones((21, 21), bool)) & (np.asarray(segments[0])[:, None] == np.asarray(segments[0]))
    for name, slope in slopes.items():
        met = np.any(np.asarray(slope).reshape(21, 21, -1), axis=-1)
        assert not np.any(met & ~reads), name
        if name in ("key", "value", "write_strength"):
            np.testing.assert_array_equal(met, reads)


@pytest.mark.parametrize("tokens", [1, pytest.param(130, marks=pytest.mark.slow)])
def test_bfloat16_errs_at_most_twice_as_much_as_the_loop_in_bfloat16(tokens):
    arrays = inputs(tokens, key_dim=16, value_dim=32)
    arrays |= {name: arrays[name].astype(jnp.bfloat16) for name in ("query", "key", "value")}
    weights = [jax.random.normal(jax.random.key(8), x.shape) for x in loop(arrays)]

    def results(function, arrays):
        def loss(arrays):
            results = function(arrays)
            return sum(jnp.sum(x * weight) for x, weight in zip(results, weights, strict=True)), tuple(results)

        gradients, values = jax.jit(jax.grad(loss, has_aux=True))(arrays)
        return dict(zip(("out", "final_state"), values, strict=True)) | gradients

    found = results(lambda x: gated_delta_rule(**x), arrays)
    assert found["out"].dtype == jnp.bfloat16
    assert found["final_state"].dtype == jnp.float32
    exact = results(lambda x: gated_delta_rule(**x), {name: x.astype(jnp.float32) for name, x in arrays.items()})
    stepped = results(by_steps, arrays)
    out, final_state = loop(arrays)
    exact |= {"out": out, "final_state": final_state}
    for name, truth in exact.items():
        truth = np.asarray(truth, np.float64)
        error, budget = (np.linalg.norm(np.asarray(x[name], np.float64) - truth) for x in (found, stepped))
        assert error <= 2 * budget + 1e-6 * np.linalg.norm(truth), (name, error / budget)


def test_memory_grows_with_the_number_of_tokens():
    """Of a gradient: twice the tokens take about twice the bytes, less than a state for every token would."""

    def temporary_bytes(tokens):
        shapes = jax.eval_shape(lambda: inputs(tokens, rows=1, heads=2, key_dim=32, value_dim=64))
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(gated_delta_rule(**x).out ** 2)))
        return gradient.lower(shapes).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(1 << 15), temporary_bytes(1 << 16)
    assert large < 2.1 * small
    assert large - small < (1 << 15) * 2 * (32 * 64 * 4) / 8


@pytest.mark.usefixtures("annotations_unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": jnp.zeros((2, 37, 2, 5))}, r"query must be \(2, 37, 2, 4\) for keys of .*, got \(2, 37, 2, 5\)"),
        ({"value": jnp.zeros((2, 36, 2, 6))}, r"value must be \(2, 37, 2, 6\) for keys of .*, got \(2, 36, 2, 6\)"),
        ({"log_decay": jnp.zeros((2, 37))}, r"log_decay must be \(2, 37, 2\) for keys of .*, got \(2, 37\)"),
        ({"write_strength": jnp.zeros((2, 37, 3))}, r"write_strength must be \(2, 37, 2\) for keys of .*, got"),
        ({"initial_state": jnp.zeros((2, 2, 6, 4))}, r"initial_state must be \(2, 2, 4, 6\) for keys of .*, got"),
        ({"key": jnp.zeros((2, 37, 8))}, r"key must be \[B, T, N, Hk\], got \(2, 37, 8\)"),
        ({"chunk_size": 0}, "chunk_size must be a whole number of 1 or more, got 0"),
        ({"segment_ids": jnp.ones((2, 37), jnp.int32)}, "segment_ids alone start every document in this call"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_cannot_be_computed_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**(inputs() | changes))


@pytest.mark.usefixtures("annotations_unchecked")
def test_segments_of_another_shape_are_refused():
    arrays = inputs()
    del arrays["initial_state"]
    with pytest.raises(ValueError, match=r"tokens' shape \(2, 37\), got \(2, 36\)"):
        gated_delta_rule(**arrays, segment_ids=jnp.ones((2, 36), jnp.int32))


def test_a_policy_that_saves_kernel_results_saves_these(small_groups):
    """The backward pass computes nothing twice that it does not without `jax.checkpoint`."""
    arrays = inputs()

    def products(run):
        pulled = jax.make_jaxpr(jax.grad(lambda arrays: run(arrays).astype(jnp.float32).sum()))(arrays)
        return str(pulled).count("dot_general[")

    def out(arrays):
        return gated_delta_rule(**arrays, chunk_size=8).out

    policy = saving_named(jax.checkpoint_policies.nothing_saveable)
    assert products(jax.checkpoint(out, policy=policy)) == products(out) < products(jax.checkpoint(out))


def test_the_kernels_of_chunks_are_traced_for_a_gpu_but_of_one_token_and_of_float32(monkeypatch):
    require_jax_triton()
    monkeypatch.setattr(platform, "expected_platform", lambda: "gpu")
    monkeypatch.setattr(platform, "expected_capability", lambda: (9, 0))
    for implementation, tokens, dtype, is_kernel in (
        ("triton", 40, jnp.bfloat16, True),
        (None, 40, jnp.bfloat16, True),
        (None, 1, jnp.bfloat16, False),
        (None, 40, jnp.float32, False),
        ("xla", 40, jnp.bfloat16, False),
    ):

        def loss(arrays, implementation=implementation):
            results = gated_delta_rule(**arrays, implementation=implementation)
            return results.out.astype(jnp.float32).sum() + results.final_state.sum()

        arrays = inputs(tokens)
        arrays["value"] = jnp.asarray(arrays["value"], dtype)
        traced = jax.jit(jax.grad(loss)).trace(arrays)
        text = str(traced.jaxpr)
        assert all((f"gated_delta_{name}" in text) == is_kernel for name in ("states", "outputs", "gradients"))
        found = [(x.shape, x.dtype) for x in jax.tree.leaves(traced.out_info)]
        assert found == [(x.shape, x.dtype) for x in jax.tree.leaves(arrays)]


@pytest.mark.usefixtures("annotations_unchecked")
def test_kernels_that_cannot_run_are_refused_by_name():
    arrays = inputs()
    with pytest.raises(UnsupportedError, match="'triton' cannot run this call: dtype float32 is none of bfloat16"):
        gated_delta_rule(**arrays, implementation="triton")
    arrays["value"] = jnp.asarray(arrays["value"], jnp.bfloat16)
    with pytest.raises(UnsupportedError, match="it runs on NVIDIA GPUs"):
        gated_delta_rule(**arrays, implementation="triton")
    with pytest.raises(UnsupportedError, match="must be one of xla, triton, got 'cudnn'"):
        gated_delta_rule(**arrays, implementation="cudnn")


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sizes", [(48, 96), (128, 128), (256, 512)])
def test_kernels_err_at_most_twice_as_much_as_plain_xla(sizes, packed):
    """In bfloat16, measured from plain XLA in float32."""
    arrays = inputs(300, rows=2, key_dim=sizes[0], value_dim=sizes[1])
    arrays |= {name: arrays[name].astype(jnp.bfloat16) for name in NAMES[:3]}
    ids = jnp.asarray([[3] * 100 + [0] * 7 + [1] * 193, [2] * 300]) if packed else None
    if packed:
        del arrays["initial_state"]
    shapes = jax.eval_shape(lambda x: tuple(gated_delta_rule(**x)), arrays)
    weights = [jax.random.normal(jax.random.key(8), x.shape) for x in shapes]
    is_token = 1.0 if ids is None else (ids != 0)[..., None, None]

    def results(arrays, implementation):
        def loss(arrays):
            results = gated_delta_rule(**arrays, segment_ids=ids, implementation=implementation)
            read = results.out.astype(jnp.float32) * is_token
            return jnp.sum(read * weights[0]) + jnp.sum(results.final_state * weights[1]), (read, results.final_state)

        with jax.default_matmul_precision("highest"):
            gradients, values = jax.jit(jax.grad(loss, has_aux=True))(arrays)
        return dict(zip(("out", "final_state"), values, strict=True)) | gradients

    exact = results(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays), "xla")
    found, plain = results(arrays, "triton"), results(arrays, "xla")
    for name, truth in exact.items():
        truth = np.asarray(truth, np.float64)
        error, budget = (np.linalg.norm(np.asarray(x[name], np.float64) - truth) for x in (found, plain))
        assert error <= 2 * budget + 1e-6 * np.linalg.norm(truth), (name, error / budget)


def step_inputs(rows=3, tokens=1, key_dim=8, value_dim=12, dtype=jnp.float32):
    arrays = inputs(tokens, rows=rows, key_dim=key_dim, value_dim=value_dim)
    return {name: jnp.asarray(x, dtype if name in NAMES[:3] else x.dtype) for name, x in arrays.items()}


def step_loop(arrays):
    """Output and state of rows as those of `going_on`, in float64."""
    arrays = {name: np.array(x, np.float64) for name, x in arrays.items()}
    arrays["initial_state"][1::3] = 0
    for name in ("log_decay", "write_strength"):
        arrays[name][2::3] = 0
    return loop(arrays)


def test_a_step_by_plain_xla_is_that_of_float64():
    arrays = step_inputs()
    out, state = run(arrays, going_on())
    assert max(relative_errors((out, state), step_loop(arrays))) < 1e-6
    np.testing.assert_array_equal(state[2], arrays["initial_state"][2])


@pytest.fixture
def kernel_calls(monkeypatch):
    """What kernels take: their name, sizes and arguments; plain XLA computes their results."""
    calls = []

    def forward(residuals):
        def record(kernel, *arguments):
            calls.append((type(kernel).__name__, kernel.shape, arguments))
            return kernel.plain(*arguments), residuals

        return record

    monkeypatch.setattr(triton_tiling, "missing_dependency", lambda: None)
    monkeypatch.setattr(gated_delta_rule_kernels.Step, "forward", forward(None))
    monkeypatch.setattr(gated_delta_rule_kernels.Rule, "forward", forward(()))
    return calls


@pytest.mark.parametrize(
    ("name", "capability", "changes", "has_state", "taken"),
    [
        ("gpu", (9, 0), {}, True, {"Step"}),
        ("gpu", (8, 0), {}, True, {"Step"}),
        ("gpu", None, {}, True, {"Step"}),
        ("gpu", (10, 0), {"dtype": jnp.bfloat16, "key_dim": 256, "value_dim": 512}, True, {"Step"}),
        ("gpu", (9, 0), {"key_dim": 264}, True, set()),
        ("gpu", (9, 0), {}, False, set()),
        ("gpu", (9, 0), {"dtype": jnp.bfloat16}, False, set()),
        ("gpu", (9, 0), {"tokens": 2}, True, set()),
        ("gpu", (9, 0), {"tokens": 2, "dtype": jnp.bfloat16}, True, {"Rule"}),
        ("gpu", (8, 0), {"tokens": 2, "dtype": jnp.bfloat16}, True, set()),
        ("cpu", None, {}, True, set()),
        ("tpu", None, {}, True, set()),
    ],
    ids=str,
)
def test_a_kernel_takes_one_token_beside_a_state_where_a_gpu_is_expected(
    name, capability, changes, has_state, taken, kernel_calls, monkeypatch
):
    trace_for(monkeypatch, name, capability)
    arrays = jax.eval_shape(lambda: step_inputs(**changes))
    if not has_state:
        del arrays["initial_state"]
    jax.eval_shape(lambda arrays: gated_delta_rule(**arrays), arrays)
    assert {kernel for kernel, *_ in kernel_calls} == taken
    kernel_calls.clear()
    jax.eval_shape(lambda arrays: gated_delta_rule(**arrays, implementation="xla"), arrays)
    assert not kernel_calls


def test_one_token_without_a_state_is_a_chunk_to_a_named_kernel(kernel_calls, monkeypatch):
    trace_for(monkeypatch, "gpu")
    arrays = step_inputs(dtype=jnp.bfloat16)
    del arrays["initial_state"]
    jax.eval_shape(lambda arrays: gated_delta_rule(**arrays, implementation="triton"), arrays)
    assert {(kernel, shape.tokens, shape.continued) for kernel, shape, _ in kernel_calls} == {("Rule", 1, False)}
    with pytest.raises(UnsupportedError, match="dtype float32 is none of bfloat16, float16"):
        gated_delta_rule(**arrays | {"value": jnp.zeros((3, 1, 2, 12))}, implementation="triton")


@pytest.mark.usefixtures("kernel_calls")
def test_a_step_by_a_named_kernel_is_refused_elsewhere(monkeypatch):
    trace_for(monkeypatch, "cpu")
    with pytest.raises(UnsupportedError, match="it runs on NVIDIA GPUs, and this program is traced for the cpu"):
        gated_delta_rule(**step_inputs(), implementation="triton")


@pytest.mark.parametrize("packed", [False, True])
def test_each_device_of_a_mesh_steps_its_own_rows(packed, kernel_calls, monkeypatch):
    trace_for(monkeypatch, "gpu")
    arrays, segments = jax.eval_shape(lambda: (step_inputs(rows=4), going_on(4)))
    with jax.sharding.use_abstract_mesh(abstract_mesh(data=2)):
        out, state = jax.eval_shape(
            lambda arrays, segments: gated_delta_rule(**arrays, segment_ids=segments if packed else None),
            arrays,
            segments,
        )
    assert (out.shape, state.shape) == (arrays["value"].shape, arrays["initial_state"].shape)
    for kernel, shape, (*given, starts) in kernel_calls:
        assert kernel == "Step" and shape.batch == 2
        assert {x.shape[0] for x in given} == {2}
        assert (starts is not None and starts.shape == (2, 1)) == packed
    assert kernel_calls


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_lowered_for_a_cpu_runs_plain_xla_and_can_be_differentiated(packed, kernel_calls, monkeypatch):
    arrays, segments = step_inputs(), going_on() if packed else None

    def gradients(implementation):
        def loss(arrays):
            results = gated_delta_rule(**arrays, segment_ids=segments, implementation=implementation)
            return jnp.sum(results.out**2) + jnp.sum(results.final_state**3)

        return jax.jit(jax.value_and_grad(loss))(arrays)

    expected = gradients("xla")
    assert not kernel_calls
    trace_for(monkeypatch, "gpu")
    jax.tree.map(np.testing.assert_array_equal, gradients(None), expected)
    assert {kernel for kernel, *_ in kernel_calls} == {"Step"}


@pytest.mark.parametrize("packed", [False, True])
def test_the_kernel_hears_which_rows_go_on_and_that_padding_changes_nothing(packed, monkeypatch):
    pytest.importorskip("triton", reason="triton is installed on Linux only")
    from pallas_kernels.gated_delta_rule import triton_step

    heard = []

    def step(shape, query, key, value, log_decay, write_strength, goes_on, state):
        heard.append((query, key, value, log_decay, write_strength, goes_on, state))
        return value, state

    monkeypatch.setattr(triton_step, "step", step)
    monkeypatch.setattr(triton_tiling, "missing_dependency", lambda: None)
    trace_for(monkeypatch, "gpu")
    arrays = step_inputs()
    arrays["log_decay"] = arrays["log_decay"].at[0, 0, 0].set(-jnp.inf)
    with jax.disable_jit():  # arrays with values
        gated_delta_rule(**arrays, segment_ids=going_on() if packed else None, implementation="triton")
    ((*of_token, goes_on, state),) = heard
    np.testing.assert_array_equal(goes_on, [True, not packed, True])
    wanted = arrays | {"log_decay": np.maximum(arrays["log_decay"], -1e3)}
    for name in ("log_decay", "write_strength"):
        wanted[name] = wanted[name] * (going_on().is_token[..., None] if packed else 1)
    for name, found in zip(NAMES, (*of_token, state), strict=True):
        np.testing.assert_array_equal(found, wanted[name])


def test_the_kernel_is_traced_with_the_state_as_the_caller_gave_it(monkeypatch):
    """Any operation on it, or a second use, would make XLA copy what the caller donates."""
    require_jax_triton()
    trace_for(monkeypatch, "gpu")

    def step(state, arrays):
        return tuple(gated_delta_rule(**arrays, initial_state=state, segment_ids=going_on(), implementation="triton"))

    arrays = step_inputs(dtype=jnp.bfloat16)
    traced = jax.make_jaxpr(step)(arrays.pop("initial_state"), arrays).jaxpr
    (run,) = (x for x in traced.eqns if traced.invars[0] in x.invars)
    assert run.outvars[1] is traced.outvars[1]
    inside = run.params["call_jaxpr"].jaxpr
    (call,) = (x for x in inside.eqns if x.params.get("name") == "gated_delta_rule_step")
    given_state = inside.invars[run.invars.index(traced.invars[0])]
    assert [x is given_state for x in call.invars] == [False] * 6 + [True]
    assert [given_state in x.invars for x in inside.eqns].count(True) == run.invars.count(traced.invars[0]) == 1
    assert call.outvars[1] is inside.outvars[1]


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(48, 96), (128, 128), (256, 512)])
def test_a_step_in_bfloat16_errs_at_most_twice_as_much_as_plain_xla(sizes):
    arrays = step_inputs(66, key_dim=sizes[0], value_dim=sizes[1], dtype=jnp.bfloat16)
    wanted = step_loop(arrays)

    def errors(implementation):
        options = {"segment_ids": going_on(66), "implementation": implementation}
        return relative_errors(jax.jit(lambda arrays: gated_delta_rule(**arrays, **options))(arrays), wanted)

    for found, plain in zip(errors("triton"), errors("xla"), strict=True):
        assert found <= 2 * plain + 1e-6  # the state is of float32


@pytest.mark.gpu
def test_a_donated_state_is_updated_in_place_on_the_gpu():
    arrays = jax.eval_shape(lambda: step_inputs(64, key_dim=128, value_dim=128, dtype=jnp.bfloat16))
    state = arrays.pop("initial_state")

    def step(state, arrays):
        return gated_delta_rule(**arrays, initial_state=state, implementation="triton")

    memory = jax.jit(step, donate_argnums=0).lower(state, arrays).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= state.size * 4
    assert memory.temp_size_in_bytes < state.size * 4
