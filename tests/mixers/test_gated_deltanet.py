"""The Gated DeltaNet mixer: a recorded public layer, the loops, a cache that does not grow, initial gates, configs."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import gated_deltanet_1b, gated_deltanet_swa_1b
from rat_jax.config import config_from_dict
from rat_jax.errors import ConfigError
from rat_jax.mixers import GatedDeltaNet, GatedDeltaNetConfig, ModelShape
from rat_jax.model import LanguageModel
from tests import reference

RECORDED = pathlib.Path(__file__).parent.parent / "testdata" / "gated_delta_net.npz"


def close(found, want, tolerance=1e-5):
    assert found.shape == want.shape
    assert np.abs(np.asarray(found, np.float64) - want).max() <= tolerance * np.abs(want).max()


def flat(mixer):
    return {".".join(path): param for path, param in nnx.to_flat_state(nnx.state(mixer))}


@pytest.fixture(scope="module")
def recorded():
    with np.load(RECORDED) as file:
        return {name.removeprefix("layer/"): file[name] for name in file.files if name.startswith("layer/")}


def parameters_of(recorded, group):
    """Recorded parameters or gradients in the mixer's layout."""
    p = {name.removeprefix(f"{group}/"): x for name, x in recorded.items() if name.startswith(f"{group}/")}
    return {
        "in_proj.kernel": np.concatenate([p[f"{name}_proj"] for name in "qkvg"]).T,
        "gate_proj.kernel": np.concatenate([p["write_proj"], p["decay_proj"]]).T,
        "out_proj.kernel": p["out_proj"].T,
        "convolution": np.concatenate([p[f"{name}_convolution"] for name in "qkv"]).T,
        "A_log": p["A_log"],
        "dt_bias": p["dt_bias"],
        "norm.scale": p["norm"],
    }


@pytest.fixture(scope="module")
def recorded_mixer(recorded):
    mixer = GatedDeltaNet(24, 2, head_dim=8, rngs=nnx.Rngs(0))
    for name, param in flat(mixer).items():
        value = parameters_of(recorded, "param")[name]
        assert param.shape == value.shape
        param[...] = jnp.asarray(value)
    return mixer


def test_equals_the_recording_of_a_public_layer(recorded, recorded_mixer):
    graphdef, params = nnx.split(recorded_mixer)

    @jax.jit
    def run(params, x, d_y):
        y, pull_back = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x), params, x)
        return y, *pull_back(d_y)

    y, d_params, d_x = run(params, recorded["x"], recorded["d_y"])
    close(y, recorded["y"])
    close(d_x, recorded["d_x"])
    want = parameters_of(recorded, "grad")
    found = {".".join(path): param[...] for path, param in nnx.to_flat_state(d_params)}
    assert found.keys() == want.keys()
    for name, gradient in found.items():
        close(gradient, want[name])


def test_the_recording_token_by_token(recorded, recorded_mixer):
    cache, outs = recorded_mixer.init_cache(batch_size=2, capacity=40), []
    graphdef, params = nnx.split(recorded_mixer)
    step = jax.jit(lambda params, x, cache: nnx.merge(graphdef, params).extend(x, cache))
    for t in range(40):
        y, cache = step(params, recorded["x"][:, t : t + 1], cache)
        outs.append(y)
    close(np.concatenate(outs, axis=1), recorded["y"])


def silu(x):
    return x * reference.sigmoid(x)


def expected(mixer, x):
    """The layer as a loop over tokens; rows are one document each."""
    p = {name: np.asarray(param[...], np.float64) for name, param in flat(mixer).items()}
    heads, key_dim = mixer.config.num_heads, mixer.config.key_dim(mixer.shape)
    q, k, v, g = np.split(x @ p["in_proj.kernel"], np.cumsum([heads * key_dim] * 2 + [len(p["out_proj.kernel"])]), -1)
    inputs = np.concatenate([q, k, v], axis=-1)
    if mixer.config.conv_size:
        convolved = np.zeros_like(inputs)
        for t in range(x.shape[1]):
            for i in range(min(t + 1, mixer.config.conv_size)):
                convolved[:, t] += p["convolution"][-1 - i] * inputs[:, t - i]
        inputs = convolved
    parts = np.split(silu(inputs), [heads * key_dim, 2 * heads * key_dim], axis=-1)
    q, k, v = (part.reshape(*x.shape[:2], heads, -1) for part in parts)
    q, k = (part / np.sqrt(np.sum(part * part, axis=-1, keepdims=True) + 1e-6) for part in (q, k))
    write, decay = np.split(x @ p["gate_proj.kernel"], 2, axis=-1)
    log_decay = -np.exp(p["A_log"]) * np.log1p(np.exp(decay + p["dt_bias"]))
    out, _ = reference.gated_delta_rule(q / math.sqrt(key_dim), k, v, log_decay, reference.sigmoid(write))
    normed = reference.rms_norm(out, p["norm.scale"]).reshape(g.shape)
    return (normed * silu(g)) @ p["out_proj.kernel"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"expand_v": 1.0, "conv_size": 0},
        {"head_dim": 5, "expand_v": 0.4, "conv_size": 2},
    ],
    ids=str,
)
def test_equals_the_loops(options):
    mixer = GatedDeltaNet(16, 4, **options, rngs=nnx.Rngs(0))
    draw = np.random.default_rng(1)
    for param in flat(mixer).values():  # large weights, uneven scales
        param[...] = jnp.float32(0.5 * draw.standard_normal(param.shape) + 0.2)
    x = draw.standard_normal((2, 13, 16))
    graphdef, params = nnx.split(mixer)
    close(jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))(params, np.float32(x)), expected(mixer, x))


def test_padding_and_documents_within_a_prompt_leave_the_convolutions_of_others_alone():
    mixer = GatedDeltaNet(16, 2, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(mixer)
    extend = jax.jit(lambda params, *arguments: nnx.merge(graphdef, params).extend(*arguments))
    x = np.random.default_rng(2).standard_normal((1, 12, 16)).astype(np.float32)
    alone, _ = extend(params, x[:, 5:], mixer.init_cache(1, 12))
    cache = mixer.init_cache(1, 12)
    _, cache = extend(params, x[:, :7], cache, jnp.asarray([[1] * 5 + [2] * 2]))
    _, cache = extend(params, x[:, :7], cache, jnp.zeros((1, 7), jnp.int32))
    rest, _ = extend(params, x[:, 5:], cache, jnp.asarray([[0] * 2 + [2] * 5]))
    close(rest[:, 2:], np.asarray(alone)[:, 2:])


def test_the_cache_has_one_size_whatever_the_length():
    mixer = GatedDeltaNet(16, 2, rngs=nnx.Rngs(0))
    for capacity in (5, 1 << 20):
        memory = jax.eval_shape(lambda capacity=capacity: mixer.init_memory(3, capacity))
        assert memory.state.shape == (3, 2, 6, 12) and memory.state.dtype == jnp.float32
        assert memory.last_inputs.shape == (3, 3, 2 * (6 + 6 + 12))
        assert mixer.step_bytes(memory, capacity) == 4 * 3 * (2 * 6 * 12 + 3 * 48)


def test_gates_start_as_published():
    mixer = GatedDeltaNet(512, 2048, head_dim=1, conv_size=4, rngs=nnx.Rngs(0))
    rates, steps = np.exp(mixer.A_log[...]), np.logaddexp(0, np.float64(mixer.dt_bias[...]))
    assert rates.min() < 0.1 and 15.9 < rates.max() <= 16 and abs(rates.mean() - 8) < 0.5
    assert 1e-3 * 0.99 < steps.min() < 1.1e-3 and 0.09 < steps.max() < 0.1 * 1.01
    assert abs(np.log(steps).mean() - np.log(1e-2)) < 0.1
    assert 0.49 < np.abs(mixer.convolution[...]).max() <= 0.5


def test_gates_and_norms_stay_float32_in_bfloat16():
    mixer = GatedDeltaNet(16, 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    exact = GatedDeltaNet(16, 2, rngs=nnx.Rngs(0))
    assert all(param.dtype == jnp.float32 for param in flat(mixer).values())
    assert not any(spec.matmul for name, spec in mixer.PARAMETERS.items() if not name.endswith("proj.kernel"))
    x = jnp.float32(np.random.default_rng(3).standard_normal((2, 30, 16)))
    want, found = exact(x), mixer(jnp.bfloat16(x))
    assert found.dtype == jnp.bfloat16
    assert np.linalg.norm(np.float32(found) - want) < 2e-2 * np.linalg.norm(want)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_kernels_err_at_most_twice_as_much_as_plain_xla(packed):
    """In bfloat16, measured from plain XLA in float32: the output, the gradients of input, matrices and taps."""
    draw = np.random.default_rng(4)
    x, d_y = (jnp.float32(draw.standard_normal((2, 300, 256))) for _ in range(2))
    ids = jnp.asarray([[3] * 100 + [0] * 7 + [1] * 193, [2] * 300]) if packed else None
    d_y = d_y if ids is None else d_y * (ids != 0)[..., None]

    def run(dtype, implementation):
        options = {"head_dim": 64, "expand_v": 1.0, "dtype": dtype, "implementation": implementation}
        graphdef, params = nnx.split(GatedDeltaNet(256, 4, **options, rngs=nnx.Rngs(0)))

        @jax.jit
        def both(params, x, d_y):
            y, pull_back = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x, ids), params, x)
            return y, *pull_back(d_y)

        with jax.default_matmul_precision("highest"):
            y, d_params, d_x = both(params, x.astype(dtype), d_y.astype(dtype))
        gradients = {".".join(path): param[...] for path, param in nnx.to_flat_state(d_params)}
        wide = {name: gradient for name, gradient in gradients.items() if gradient.ndim == 2}
        return wide | {"x": d_x, "y": y if ids is None else y * (ids != 0)[..., None]}

    exact, plain, found = run(jnp.float32, "xla"), run(jnp.bfloat16, "xla"), run(jnp.bfloat16, "triton")
    assert {"in_proj.kernel", "out_proj.kernel", "convolution"} < set(exact)
    for name, truth in exact.items():
        truth = np.asarray(truth, np.float64)
        error, budget = (np.linalg.norm(np.asarray(x[name], np.float64) - truth) for x in (found, plain))
        assert error <= 2 * budget, (name, error / budget)


@pytest.mark.parametrize(
    ("module", "millions"), [(gated_deltanet_1b, 1299.8), (gated_deltanet_swa_1b, 1265.7)], ids=["alone", "swa"]
)
def test_published_sizes(module, millions):
    config = config_from_dict(module.get_config()).model
    state = jax.eval_shape(lambda: nnx.state(LanguageModel(config, rngs=nnx.Rngs(0))))
    assert round(sum(math.prod(x.shape) for x in jax.tree.leaves(state)) / 1e6, 1) == millions
    mixer = config.mixers["gated_deltanet"]
    assert (mixer.heads(config), mixer.key_dim(config), mixer.value_dim(config)) == (6, 256, 512)


def test_work_is_counted_in_keys_of_the_width():
    """A token multiplies its state three times; an attended key costs two products with all channels."""
    config, shape = GatedDeltaNetConfig(num_heads=6, head_dim=256), ModelShape(width=2048, num_heads=16)
    assert 2 * config.mean_keys(shape, 4096) * shape.width == 3 * 6 * 256 * 512


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads must be 1 or more, got 0"),
        ({"num_heads": 5}, "head_dim must be given where num_heads does not divide 3/4 of the width, got num_heads 5"),
        ({"head_dim": 0}, "head_dim must be 1 or more, got 0"),
        ({"head_dim": 3, "expand_v": 1.5}, "expand_v times head_dim must be a whole number, got 1.5 and 3"),
        ({"expand_v": 0.0}, "expand_v must be above 0, got 0.0"),
        ({"conv_size": -1}, "conv_size must be 0 or more, got -1"),
    ],
    ids=str,
)
def test_what_no_layer_can_have_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        GatedDeltaNet(16, **({"num_heads": 2} | options), rngs=nnx.Rngs(0))
