"""What stands between two mixers: values, which implementation is chosen, and decode steps by the kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from pallas_kernels.between_mixers import mosaic_gpu, mosaic_gpu_tiling
from pallas_kernels.between_mixers.shape import BetweenMixersShape
from rat_jax import layers
from rat_jax.decoder import _extend
from rat_jax.ops import NormedMatrix, UnsupportedError, between_mixers
from tests.abstract_mesh import abstract_mesh
from tests.ops.devices import trace_for
from tests.ops.few_rows import check_steps_alone_run, small_model, take_cpu_for_hopper_alone
from tests.pallas_kernels import mosaic_emulator

EPSILON = 1e-2  # large enough to be seen in the values
KERNEL = "between_mixers_mosaic"


def arrays(rows, inputs, width, hidden, outputs, dtype=jnp.float32):
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def matrix(*sizes):
        return (jax.random.normal(next(keys), sizes) * sizes[0] ** -0.5).astype(dtype)

    def normed(size):
        return NormedMatrix(1 + 0.3 * jax.random.normal(next(keys), (width,)), matrix(width, size))

    tokens = matrix(rows, 1, inputs), matrix(rows, 1, width)
    return (*tokens, matrix(inputs, width), normed(hidden), matrix(hidden, width), normed(outputs) if outputs else None)


def truth(mixed, x, out, up, down, following) -> list[np.ndarray]:
    def normed(x, by):
        return x / np.sqrt(np.mean(x**2, axis=2, keepdims=True) + EPSILON) * by.scale @ by.matrix

    x = x + mixed @ out
    units = normed(x, up)
    x = x + units * 0.5 * (1 + scipy.special.erf(units / np.sqrt(2))) @ down
    return [x] if following is None else [x, normed(x, following)]


@pytest.mark.parametrize("outputs", [0, 7])
def test_values_are_those_of_float64(outputs):
    given = arrays(3, 6, 8, 10, outputs)
    found = between_mixers(*given, epsilon=EPSILON)
    assert (found.product is None) == (outputs == 0)
    want = truth(*jax.tree.map(lambda x: np.asarray(x, np.float64), given))
    for x, y in zip(found, want, strict=outputs > 0):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def is_kernel(*given, **options) -> bool:
    traced = jax.jit(lambda *given: between_mixers(*given, epsilon=EPSILON, **options)).trace(*given)
    return KERNEL in str(traced.jaxpr)


def sizes(rows=1, inputs=2048, width=2048, hidden=8192, outputs=6656, dtype=jnp.bfloat16):
    return jax.eval_shape(lambda: arrays(rows, inputs, width, hidden, outputs, dtype))


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, True),
        ({"rows": 2}, True),
        ({"outputs": 0}, True),
        ({"outputs": 6144}, True),
        ({"dtype": jnp.float16}, True),
        ({"rows": 3}, False),
        ({"dtype": jnp.float32}, False),
        ({"outputs": 4096}, False),  # too few programs
        ({"hidden": 16384}, False),  # too many
    ],
)
def test_the_kernel_is_chosen_for_few_rows(changes, chosen, monkeypatch):
    trace_for(monkeypatch, "gpu", (9, 0))
    assert is_kernel(*sizes(**changes)) == chosen
    assert not is_kernel(*sizes(**changes), implementation="xla")


@pytest.mark.parametrize(
    "found",
    [
        ("gpu", (8, 0)),
        ("gpu", (10, 0)),
        ("gpu", None),
        ("gpu", (9, 0), 114),
        ("gpu", (9, 0), None),
        ("tpu", None),
        ("cpu", None),
    ],
)
def test_the_kernel_is_chosen_for_whole_hopper_cards_alone(found, monkeypatch):
    trace_for(monkeypatch, *found)
    assert not is_kernel(*sizes())


def test_elsewhere_the_normed_products_may_be_kernels_but_not_those_of_plain_xla(monkeypatch):
    trace_for(monkeypatch, "gpu", (9, 0))

    def launches(**options):
        traced = jax.jit(lambda *given: between_mixers(*given, epsilon=EPSILON, **options)).trace(*sizes(rows=3))
        return "normed_product_mosaic" in str(traced.jaxpr)

    assert launches()
    assert not launches(implementation="xla")


def test_the_kernel_is_not_chosen_where_a_mesh_cuts_arrays(monkeypatch):
    trace_for(monkeypatch, "gpu", (9, 0))
    for axis in ("data", "fsdp", "context", "tensor"):
        with jax.sharding.use_abstract_mesh(abstract_mesh(**{axis: 2})):
            assert not is_kernel(*sizes(rows=2))
            with pytest.raises(UnsupportedError, match="one device, and the mesh in use cuts arrays over 2"):
                is_kernel(*sizes(rows=2), implementation="mosaic_gpu")


def test_a_named_kernel_says_why_it_does_not_run(monkeypatch):
    with pytest.raises(UnsupportedError, match="it runs on NVIDIA GPUs, and this program is traced for the cpu"):
        is_kernel(*sizes(), implementation="mosaic_gpu")
    trace_for(monkeypatch, "gpu", (9, 0))
    assert is_kernel(*sizes(outputs=4096), implementation="mosaic_gpu")
    for given, options, message in (
        (sizes(rows=3), {}, "3 rows are more than 2; implementation 'xla' takes them"),
        (sizes(), {"dtype": jnp.float16}, "x is bfloat16 and the products float16; cast x"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            is_kernel(*given, implementation="mosaic_gpu", **options)


@pytest.mark.usefixtures("annotations_unchecked")
def test_what_does_not_fit_is_refused():
    mixed, x, out, up, down, following = arrays(2, 6, 8, 10, 7)
    for given, options, message in (
        ((mixed, x[:, 0], out, up, down), {}, r"mixed must be \[B, 1, c\] and x \[B, 1, D\]"),
        ((jnp.concatenate([mixed, mixed], 1), jnp.concatenate([x, x], 1), out, up, down), {}, r"x \[B, 1, D\]"),
        ((mixed[:1], x, out, up, down), {}, r"mixed must be \[B, 1, c\]"),
        ((mixed, x, out.T, up, down), {}, r"the matrix of out must be \(6, 8\) beside the others, got \(8, 6\)"),
        ((mixed, x, out, up, down.T), {}, r"the matrix of down must be \(10, 8\)"),
        (
            (mixed, x, out, up, down, NormedMatrix(following.scale, out)),
            {},
            r"the matrix of following must be \(8, 8\)",
        ),
        ((mixed, x, out, NormedMatrix(up.scale[1:], up.matrix), down), {}, r"the scale of up must be \(8,\)"),
        ((mixed, x, out, up, down, NormedMatrix(following.scale, x[:, 0, 0])), {}, "the matrix of following must be"),
        ((mixed, x, out.astype(int), up, down), {}, "out must be of floating numbers"),
        ((mixed, x, out, NormedMatrix(up.scale.astype(int), up.matrix), down), {}, "scale of up must be of floating"),
        ((mixed, x, out, up, down), {"epsilon": 0.0}, "epsilon must be above 0, got 0"),
        ((mixed, x, out, up, down), {"implementation": "cuda"}, "must be one of xla, mosaic"),
    ):
        with pytest.raises(ValueError, match=message):
            between_mixers(*given, **({"epsilon": 1.0} | options))


def test_elements_of_a_vmap_are_launches_of_their_own(monkeypatch):
    """Side by side they would share their semaphores, and not be on the card at once."""
    trace_for(monkeypatch, "gpu", (9, 0))
    given = jax.eval_shape(lambda: jax.tree.map(lambda x: jnp.stack([x] * 3), arrays(1, 2048, 2048, 8192, 6656)))
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if x.ndim > 2 else x.dtype), given)
    traced = jax.jit(jax.vmap(lambda *given: between_mixers(*given, epsilon=EPSILON))).trace(*given)
    assert [x.shape for x in jax.tree.leaves(traced.out_info)] == [(3, 1, 1, 2048), (3, 1, 1, 6656)]
    assert KERNEL in str(traced.jaxpr)
    assert "grid=(128,)" in str(traced.jaxpr)
    assert "grid=(3, 128)" not in str(traced.jaxpr)


def test_gradients_of_a_call_that_the_kernel_takes_are_plain(monkeypatch):
    given = arrays(1, 128, 128, 6144, 6144, jnp.bfloat16)

    def gradients(implementation):
        def loss(*given):
            found = between_mixers(*given, epsilon=EPSILON, implementation=implementation)
            return sum(jnp.sum(x.astype(jnp.float32)) for x in found)

        return jax.jit(jax.grad(loss, argnums=tuple(range(6)))).trace(*given)

    plain = gradients("xla").lower().compile()(*given)
    trace_for(monkeypatch, "gpu", (9, 0))
    monkeypatch.setattr(mosaic_gpu_tiling, "fills_card", lambda shape: True)
    traced = gradients(None)
    assert KERNEL in str(traced.jaxpr)
    for found, want in zip(jax.tree.leaves(traced.lower().compile()(*given)), jax.tree.leaves(plain), strict=True):
        found, want = (np.asarray(x.astype(jnp.float32)) for x in (found, want))
        assert np.linalg.norm(found - want) < 4e-3 * np.linalg.norm(want)  # bfloat16's roundoff


@pytest.fixture
def as_hopper(monkeypatch):
    take_cpu_for_hopper_alone(monkeypatch, mosaic_gpu_tiling)


@pytest.mark.usefixtures("as_hopper")
def test_decode_steps_run_the_kernel_and_neither_prompts_nor_training():
    check_steps_alone_run(KERNEL, 2)


@pytest.mark.usefixtures("as_hopper")
@pytest.mark.parametrize("kind", ["geglu", "swiglu"])
def test_gated_mlps_do_not(kind):
    decoder = small_model("rat", "rnn", mlp_kind=kind).decoder()
    cache = jax.eval_shape(lambda: decoder.init_cache(2, 16))
    assert KERNEL not in str(jax.make_jaxpr(decoder.extend)(jnp.zeros((2, 1), jnp.int32), cache))


@pytest.fixture
def emulated(as_hopper, monkeypatch):
    """Calls, in sizes, that the emulated kernel runs."""
    calls = []

    def run(shape, *arrays, by=mosaic_gpu.run, **options):
        calls.append((shape.rows, shape.inputs, shape.width, shape.hidden, shape.outputs))
        return by(shape, *arrays, **options)

    mosaic_emulator.install(monkeypatch, seed=0, all_used=True)
    monkeypatch.setattr(mosaic_gpu, "run", run)
    monkeypatch.setattr(jax.custom_batching, "sequential_vmap", lambda function: function)  # would trace it
    return calls


# Gated DeltaNet reads its input twice, so that no product of it is multiplied ahead.
@pytest.mark.parametrize(("second", "value_width", "ahead"), [("rnn", 128, 384), ("gated_deltanet", 256, 0)])
def test_a_decode_step_by_the_kernel_is_that_of_xla(second, value_width, ahead, emulated, monkeypatch):
    by, decoder = layers.normed_product, small_model("rat", second).decoder()
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, decoder.config.vocab_size)
    _, cache = decoder.extend(tokens[:, :6], decoder.init_cache(2, 16))
    assert not emulated
    products = []
    with monkeypatch.context() as patch, jax.disable_jit():  # the emulator takes arrays with values
        patch.setattr(layers, "normed_product", lambda *given, **options: products.append(1) or by(*given, **options))
        found, _ = decoder.extend(tokens[:, 6:], cache)
    assert len(products) == 1  # the first layer's; the second one is given its own, or norms before two
    assert emulated == [(2, 128, 128, 256, ahead), (2, value_width, 128, 256, 0)]
    with monkeypatch.context() as patch:
        patch.setattr(mosaic_gpu_tiling, "fills_card", lambda shape: False)
        jax.clear_caches()  # layers that an earlier test has traced
        want, _ = decoder.extend(tokens[:, 6:], cache)
    error = np.linalg.norm(found - want) / np.linalg.norm(want)
    assert 0 < error < 8e-3  # the spacing of bfloat16


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("pattern", [("rat", "rat"), ("attention", "rnn"), ("local_attention", "rat")], ids="-".join)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_of_real_width_on_a_gpu_is_as_near_to_float32_as_that_of_xla(rows, pattern, monkeypatch):
    sizes = {"width": 2048, "num_heads": 16, "mlp_width": 8192}
    shape = BetweenMixersShape(rows, 2048, 2048, 8192, 6144, "bfloat16")

    def step(fills, **changes):
        monkeypatch.setattr(mosaic_gpu_tiling, "fills_card", lambda shape: fills)
        jax.clear_caches()
        decoder = small_model(*pattern, **sizes, **changes).decoder()
        tokens = jax.random.randint(jax.random.key(1), (rows, 7), 0, decoder.config.vocab_size)
        _, cache = decoder.extend(tokens[:, :6], decoder.init_cache(rows, 16))
        traced = _extend.trace(decoder.layout, decoder.arrays, tokens[:, 6:], cache, None)
        logits = traced.lower().compile()(decoder.arrays, tokens[:, 6:], cache, None)[0]
        return np.asarray(logits), KERNEL in str(traced.jaxpr)

    assert mosaic_gpu_tiling.fills_card(shape)
    (found, by_kernel), (plain, plain_by_kernel) = step(fills=True), step(fills=False)
    assert (by_kernel, plain_by_kernel) == (True, False)
    with jax.default_matmul_precision("highest"):
        want, _ = step(fills=False, dtype="float32")
    error, of_plain = (np.linalg.norm(x - want) / np.linalg.norm(want) for x in (found, plain))
    assert 0 < error <= 2 * of_plain
    assert error < 3e-2
