"""The norm and the product behind it: values, which implementation is chosen, and decode steps by the kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from pallas_kernels.between_mixers import mosaic_gpu_tiling as between_mixers_tiling
from pallas_kernels.normed_product import mosaic_gpu, mosaic_gpu_tiling
from pallas_kernels.normed_product.shape import NormedProductShape
from rat_jax.decoder import _extend
from rat_jax.ops import UnsupportedError, normed_product
from tests.abstract_mesh import abstract_mesh
from tests.ops.devices import trace_for
from tests.ops.few_rows import check_steps_alone_run, small_model, take_cpu_for_hopper_alone
from tests.pallas_kernels import mosaic_emulator

EPSILON = 1e-2  # large enough to be seen in the values


def arrays(batch, tokens, inputs, outputs, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(0), 3)
    x = 0.2 * jax.random.normal(keys[0], (batch, tokens, inputs))
    matrix = jax.random.normal(keys[1], (inputs, outputs)) / inputs**0.5
    return x.astype(dtype), 1 + 0.3 * jax.random.normal(keys[2], (inputs,)), matrix.astype(dtype)


@pytest.mark.parametrize("gelu", [False, True])
def test_values_are_those_of_float64(gelu):
    given = arrays(2, 3, 8, 5, jnp.float32)
    x, scale, matrix = (np.asarray(x, np.float64) for x in given)
    want = x / np.sqrt(np.mean(x**2, axis=2, keepdims=True) + EPSILON) * scale @ matrix
    if gelu:
        want *= 0.5 * (1 + scipy.special.erf(want / np.sqrt(2)))
    np.testing.assert_allclose(normed_product(*given, epsilon=EPSILON, gelu=gelu), want, rtol=1e-5, atol=1e-6)


def is_kernel(*given, **options) -> bool:
    traced = jax.jit(lambda *given: normed_product(*given, epsilon=EPSILON, **options)).trace(*given)
    return "normed_product_mosaic" in str(traced.jaxpr)


def sizes(batch=16, tokens=1, inputs=2048, outputs=6656, dtype=jnp.bfloat16):
    return jax.eval_shape(lambda: arrays(batch, tokens, inputs, outputs, dtype))


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, True),
        ({"batch": 1}, True),
        ({"outputs": 8192}, True),
        ({"dtype": jnp.float16}, True),
        ({"batch": 17}, False),
        ({"batch": 1, "tokens": 2}, False),
        ({"dtype": jnp.float32}, False),
        ({"inputs": 2112}, False),
        ({"outputs": 6660}, False),
        ({"outputs": 2048}, False),  # too few programs
        ({"outputs": 32000}, False),  # too many
    ],
)
def test_the_kernel_is_chosen_for_one_token_of_few_rows(changes, chosen, monkeypatch):
    trace_for(monkeypatch, "gpu", (9, 0))
    assert is_kernel(*sizes(**changes)) == chosen
    assert not is_kernel(*sizes(**changes), implementation="xla")


@pytest.mark.parametrize("found", [("gpu", (8, 0)), ("gpu", (10, 0)), ("gpu", None), ("tpu", None), ("cpu", None)])
def test_the_kernel_is_chosen_for_hopper_alone(found, monkeypatch):
    trace_for(monkeypatch, *found)
    assert not is_kernel(*sizes())


def test_the_kernel_is_not_chosen_where_a_mesh_cuts_arrays(monkeypatch):
    trace_for(monkeypatch, "gpu", (9, 0))
    for axis in ("data", "fsdp", "context", "tensor"):
        with jax.sharding.use_abstract_mesh(abstract_mesh(**{axis: 4})):
            assert not is_kernel(*sizes())
            with pytest.raises(UnsupportedError, match="one device, and the mesh in use cuts arrays over 4"):
                is_kernel(*sizes(), implementation="mosaic_gpu")


def test_a_named_kernel_says_why_it_does_not_run(monkeypatch):
    with pytest.raises(UnsupportedError, match="it runs on NVIDIA GPUs, and this program is traced for the cpu"):
        is_kernel(*sizes(), implementation="mosaic_gpu")
    trace_for(monkeypatch, "gpu", (9, 0))
    assert is_kernel(*sizes(batch=2, tokens=8, outputs=64), implementation="mosaic_gpu")
    for given, options, message in (
        (sizes(batch=17), {}, "17 rows are more than 16; implementation 'xla' takes them"),
        (sizes(), {"dtype": jnp.float16}, "x is bfloat16 and the product float16; cast x"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            is_kernel(*given, implementation="mosaic_gpu", **options)


@pytest.mark.usefixtures("annotations_unchecked")
def test_what_does_not_fit_is_refused():
    x, scale, matrix = arrays(1, 1, 128, 64)
    for call, message in (
        (lambda: normed_product(x[0], scale, matrix, epsilon=1.0), r"x must be \[B, T, D\], scale \[D\] and matrix"),
        (lambda: normed_product(x, scale[1:], matrix, epsilon=1.0), r"x must be \[B, T, D\], scale \[D\] and matrix"),
        (lambda: normed_product(x, scale, matrix[1:], epsilon=1.0), r"x must be \[B, T, D\], scale \[D\] and matrix"),
        (lambda: normed_product(x, scale, matrix.astype(int), epsilon=1.0), "matrix must be of floating numbers"),
        (lambda: normed_product(x[:, :0], scale, matrix, epsilon=1.0), "tokens must be a whole number of 1 or more"),
        (lambda: normed_product(x, scale, matrix, epsilon=0.0), "epsilon must be above 0, got 0"),
        (lambda: normed_product(x, scale, matrix, epsilon=1.0, implementation="cuda"), "must be one of xla, mosaic"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_gradients_of_a_call_that_the_kernel_takes_are_plain(monkeypatch):
    given = arrays(2, 1, 128, 6144)

    def gradients(implementation):
        def loss(*given):
            out = normed_product(*given, epsilon=EPSILON, gelu=True, implementation=implementation)
            return jnp.sum(out.astype(jnp.float32))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*given)

    plain = gradients("xla").lower().compile()(*given)
    trace_for(monkeypatch, "gpu", (9, 0))
    traced = gradients(None)
    assert "normed_product_mosaic" in str(traced.jaxpr)
    for found, want in zip(traced.lower().compile()(*given), plain, strict=True):
        np.testing.assert_array_equal(found, want)


@pytest.fixture
def as_hopper(monkeypatch):
    take_cpu_for_hopper_alone(monkeypatch, mosaic_gpu_tiling)


@pytest.mark.usefixtures("as_hopper")
def test_decode_steps_run_the_kernel_and_neither_prompts_nor_training():
    check_steps_alone_run("normed_product_mosaic", 16)


@pytest.fixture
def emulated(as_hopper, monkeypatch):
    """Calls, in sizes, that the emulated kernel runs."""
    calls = []

    def multiply(shape, *arrays, by=mosaic_gpu.multiply, **options):
        calls.append((shape.rows, shape.inputs, shape.outputs, shape.gelu))
        return by(shape, *arrays, **options)

    mosaic_emulator.install(monkeypatch, seed=0, all_used=True)
    monkeypatch.setattr(mosaic_gpu, "multiply", multiply)
    return calls


def test_a_decode_step_by_the_kernel_is_that_of_xla(emulated, monkeypatch):
    decoder = small_model("rat").decoder()
    tokens = jax.random.randint(jax.random.key(1), (3, 7), 0, decoder.config.vocab_size)
    _, cache = decoder.extend(tokens[:, :6], decoder.init_cache(3, 16))
    assert not emulated
    with jax.disable_jit():  # the emulator takes arrays with values
        found, _ = decoder.extend(tokens[:, 6:], cache)
    assert emulated == [(3, 128, 640, False), (3, 128, 256, True)]
    with monkeypatch.context() as patch:
        patch.setattr(mosaic_gpu_tiling, "fills_card", lambda shape: False)
        jax.clear_caches()  # layers that an earlier test has traced
        want, _ = decoder.extend(tokens[:, 6:], cache)
    error = np.linalg.norm(found - want) / np.linalg.norm(want)
    assert 0 < error < 8e-3  # the spacing of bfloat16


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("rows", [1, 2, 11, 16])
def test_a_step_of_real_width_on_a_gpu_is_that_of_xla(rows, monkeypatch):
    # One or two rows would be the launch of all between two mixers, of which the normed products are no part.
    monkeypatch.setattr(between_mixers_tiling, "fills_card", lambda shape: False)
    decoder = small_model("rat", width=2048, num_heads=16, mlp_width=8192).decoder()
    tokens = jax.random.randint(jax.random.key(1), (rows, 7), 0, decoder.config.vocab_size)
    _, cache = decoder.extend(tokens[:, :6], decoder.init_cache(rows, 16))

    def step():
        traced = _extend.trace(decoder.layout, decoder.arrays, tokens[:, 6:], cache, None)
        assert ("normed_product_mosaic" in str(traced.jaxpr)) == mosaic_gpu_tiling.fills_card(shape)
        return np.asarray(traced.lower().compile()(decoder.arrays, tokens[:, 6:], cache, None)[0])

    shape = NormedProductShape(rows, 2048, 8192, "bfloat16")
    found = step()
    monkeypatch.setattr(mosaic_gpu_tiling, "fills_card", lambda shape: False)
    jax.clear_caches()
    want = step()
    assert 0 < np.linalg.norm(found - want) / np.linalg.norm(want) < 8e-3  # the spacing of bfloat16
