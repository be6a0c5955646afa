"""Linear attention of one token a row that continues a state: which implementation takes it, and what it computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_attention import triton_tiling
from rat_jax.ops import UnsupportedError, linear_attention, linear_attention_kernels
from tests import reference
from tests.abstract_mesh import abstract_mesh
from tests.jax_triton import require_jax_triton
from tests.ops.devices import trace_for
from tests.ops.steps import going_on, relative_errors

ROWS, HEADS, KEY_HEADS = 3, 4, 2


def inputs(tokens=1, head_dim=8, dtype=jnp.float32, rows=ROWS):
    """Query, key and value, and a state."""
    keys = jax.random.split(jax.random.key(tokens), 4)
    counts = (HEADS, KEY_HEADS, KEY_HEADS)
    arrays = [jax.random.normal(key, (rows, tokens, n, head_dim), dtype) for key, n in zip(keys, counts, strict=False)]
    return *arrays, jax.random.normal(keys[3], (rows, KEY_HEADS, 2 * head_dim, head_dim))


def initial(rows, heads, head_dim=8):
    return jax.random.normal(jax.random.key(5), (rows, heads, 2 * head_dim, head_dim))


def attend(query, key, value, state, **options):
    return linear_attention(query, key, value, state=state, **options)


def step_in_float64(query, key, value, state, initial_state, feature_map):
    """Output and state of rows as those of `going_on`."""

    def features(x):
        m = (lambda x: np.maximum(x, 0)) if feature_map == "relu" else reference.softmax
        return np.concatenate([m(x), m(-x)])

    query, key, value, after = (np.array(x, np.float64) for x in (query, key, value, state))
    out = np.empty_like(query)
    for row in range(len(query)):
        for k in range(KEY_HEADS):
            if row % 3 == 1:
                after[row, k] = 0
            if row % 3 != 2:
                after[row, k] += np.outer(features(key[row, 0, k]), value[row, 0, k])
        for n in range(HEADS):
            read = after[row, n * KEY_HEADS // HEADS]
            if initial_state is not None:
                given = np.asarray(initial_state, np.float64)
                read = read + given[row % len(given), n * given.shape[1] // HEADS]
            out[row, 0, n] = features(query[row, 0, n]) @ read
    return out, after


INITIAL = [None, (1, KEY_HEADS), (ROWS, HEADS)]


@pytest.mark.parametrize("shape", INITIAL, ids=str)
@pytest.mark.parametrize("feature_map", ["softmax", "relu"])
def test_a_step_by_plain_xla_is_that_of_float64(feature_map, shape):
    arrays, start = inputs(), None if shape is None else initial(*shape)
    options = {"feature_map": feature_map, "initial_state": start, "segment_ids": going_on()}
    wanted = step_in_float64(*arrays, start, feature_map)
    assert max(relative_errors(attend(*arrays, **options), wanted)) < 1e-6


@pytest.fixture
def steps(monkeypatch):
    """Calls that the kernel takes, in its sizes and arguments; plain XLA computes its results."""
    calls = []

    def forward(kernel, *arguments):
        calls.append((kernel.shape, arguments))
        return kernel.plain(*arguments), None

    monkeypatch.setattr(triton_tiling, "missing_dependency", lambda: None)
    monkeypatch.setattr(linear_attention_kernels.Step, "forward", forward)
    return calls


@pytest.mark.parametrize(
    ("name", "changes", "taken"),
    [
        ("gpu", {}, True),
        ("gpu", {"dtype": jnp.bfloat16, "head_dim": 256}, True),
        ("gpu", {"tokens": 2}, False),
        ("gpu", {"head_dim": 264}, False),
        ("cpu", {}, False),
        ("tpu", {}, False),
    ],
)
def test_the_kernel_takes_one_token_where_a_gpu_is_expected(name, changes, taken, steps, monkeypatch):
    trace_for(monkeypatch, name)
    arrays = jax.eval_shape(lambda: inputs(**changes))
    jax.eval_shape(attend, *arrays)
    assert bool(steps) == taken
    steps.clear()
    jax.eval_shape(lambda *arrays: attend(*arrays, implementation="xla"), *arrays)
    assert not steps


@pytest.mark.usefixtures("steps")
def test_a_named_kernel_says_why_it_does_not_run(monkeypatch):
    trace_for(monkeypatch, "gpu")
    with pytest.raises(UnsupportedError, match="it takes a state beside one token a row alone; implementation 'xla'"):
        attend(*inputs(tokens=2), implementation="triton")
    trace_for(monkeypatch, "cpu")
    with pytest.raises(UnsupportedError, match="it runs on NVIDIA GPUs, and this program is traced for the cpu"):
        attend(*inputs(), implementation="triton")


@pytest.mark.parametrize(("shape", "rows"), [(None, None), ((1, HEADS), 1), ((4, KEY_HEADS), 2)], ids=str)
def test_each_device_of_a_mesh_steps_its_own_rows(shape, rows, steps, monkeypatch):
    trace_for(monkeypatch, "gpu")
    arrays, start = jax.eval_shape(lambda: (inputs(rows=4), None if shape is None else initial(*shape)))
    with jax.sharding.use_abstract_mesh(abstract_mesh(data=2)):
        out, state = jax.eval_shape(lambda arrays, start: attend(*arrays, initial_state=start), arrays, start)
    assert (out.shape, state.shape) == (arrays[0].shape, arrays[3].shape)
    for sizes, (*given, documents, initial_state, state) in steps:
        assert sizes.batch == 2 and documents is None
        assert {x.shape[0] for x in (*given, state)} == {2}
        assert (None if initial_state is None else initial_state.shape[0]) == rows
    assert steps


@pytest.mark.parametrize("shape", INITIAL, ids=str)
def test_a_step_lowered_for_a_cpu_runs_plain_xla_and_can_be_differentiated(shape, steps, monkeypatch):
    arrays, start = inputs(), None if shape is None else initial(*shape)

    def gradients(implementation):
        def loss(arrays, start):
            options = {"initial_state": start, "segment_ids": going_on(), "implementation": implementation}
            attended = attend(*arrays, **options)
            return jnp.sum(attended.out**2) + jnp.sum(attended.state**3)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(arrays, start)

    expected = gradients("xla")
    trace_for(monkeypatch, "gpu")
    jax.tree.map(np.testing.assert_array_equal, gradients(None), expected)
    assert steps


@pytest.mark.parametrize("packed", [False, True])
def test_the_kernel_hears_which_rows_go_on_and_no_value_of_padding(packed, monkeypatch):
    pytest.importorskip("triton", reason="triton is installed on Linux only")
    from pallas_kernels.linear_attention import triton_step

    heard = []

    def step(shape, query, key, value, goes_on, initial_state, state):
        heard.append((np.asarray(value), np.asarray(goes_on), initial_state, state))
        return query, state

    monkeypatch.setattr(triton_step, "step", step)
    monkeypatch.setattr(triton_tiling, "missing_dependency", lambda: None)
    trace_for(monkeypatch, "gpu")
    *arrays, state = inputs()
    options = {"segment_ids": going_on()} if packed else {}
    start = initial(1, HEADS)
    with jax.disable_jit():  # arrays with values
        attend(*arrays, state, initial_state=start, implementation="triton", **options)
    ((value, goes_on, *states),) = heard
    np.testing.assert_array_equal(goes_on, [True, not packed, True])
    np.testing.assert_array_equal(value, arrays[2] * (going_on().is_token[..., None, None] if packed else 1))
    for found, given in zip(states, (start, state), strict=True):
        np.testing.assert_array_equal(found, given)


@pytest.mark.parametrize("shape", INITIAL, ids=str)
def test_the_kernel_is_traced_with_the_state_as_the_caller_gave_it(shape, monkeypatch):
    """Any operation on it, or a second use, would make XLA copy what the caller donates."""
    require_jax_triton()
    trace_for(monkeypatch, "gpu")
    arrays, start = inputs(dtype=jnp.bfloat16), None if shape is None else initial(*shape)

    def step(state, *arrays):
        return attend(*arrays, state, initial_state=start, segment_ids=going_on(), implementation="triton")

    *given, state = arrays
    traced = jax.make_jaxpr(step)(state, *given).jaxpr
    (run,) = (x for x in traced.eqns if traced.invars[0] in x.invars)
    assert run.outvars[1] is traced.outvars[1]
    inside = run.params["call_jaxpr"].jaxpr
    (call,) = (x for x in inside.eqns if x.params.get("name") == "linear_attention_step")
    given_state = inside.invars[run.invars.index(traced.invars[0])]
    assert [x is given_state for x in call.invars] == [False] * 5 + [True]
    assert [given_state in x.invars for x in inside.eqns].count(True) == run.invars.count(traced.invars[0]) == 1
    assert call.outvars[1] is inside.outvars[1]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [None, (1, KEY_HEADS), (66, HEADS)], ids=str)
@pytest.mark.parametrize("feature_map", ["softmax", "relu"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_step_in_bfloat16_errs_at_most_twice_as_much_as_plain_xla(head_dim, feature_map, shape):
    arrays = inputs(head_dim=head_dim, dtype=jnp.bfloat16, rows=66)
    start = None if shape is None else initial(*shape, head_dim)
    wanted = step_in_float64(*arrays, start, feature_map)

    def errors(implementation):
        options = {"feature_map": feature_map, "segment_ids": going_on(66), "implementation": implementation}
        run = jax.jit(lambda arrays, start: attend(*arrays, initial_state=start, **options))
        return relative_errors(run(arrays, start), wanted)

    with jax.default_matmul_precision("highest"):  # plain XLA's float32 products are TF32 on a GPU else
        plain = errors("xla")
    for found, bound in zip(errors("triton"), plain, strict=True):
        assert found <= 2 * bound


@pytest.mark.gpu
def test_a_donated_state_is_updated_in_place_on_the_gpu():
    *arrays, state = jax.eval_shape(lambda: inputs(head_dim=128, dtype=jnp.bfloat16, rows=64))
    step = jax.jit(lambda state, *arrays: attend(*arrays, state, implementation="triton"), donate_argnums=0)
    memory = step.lower(state, *arrays).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= state.size * 4
    assert memory.temp_size_in_bytes < state.size * 4
