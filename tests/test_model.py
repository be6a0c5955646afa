"""What every pattern of mixers must hold: one forward for all uses, causality, documents, padding."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rat_jax.model import LanguageModel
from tests.small import PAIRS, PATTERNS, small_model

TOKENS = 14  # three chunks of 4 and a part of one; nearly three windows of 5
LATER = 7  # tokens read after them
LONGEST = TOKENS + LATER
ATOL = 2e-5  # of logits of order 10, float32


# Shared key heads, normed queries and keys and gated MLPs, as global-local models have them.
OPTIONS = {"num_kv_heads": 2, "qk_norm": True, "mlp_kind": "geglu"}
MODELS = [
    *((pair, OPTIONS if {"attention", "rattention"} & {*pair} else {}) for pair in PAIRS),
    *(pytest.param((pattern, {}), marks=pytest.mark.slow) for pattern in PATTERNS),
]


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: "+".join(model[0]))
def functions(request):
    pattern, options = request.param
    return Functions(small_model(pattern, num_layers=len(pattern), **options))


class Functions:
    """Jitted forms of a model, compiled once for each shape."""

    def __init__(self, model: LanguageModel):
        graphdef, params = nnx.split(model)
        self.model = model
        forward = jax.jit(lambda params, tokens, segments: nnx.merge(graphdef, params)(tokens, segments))
        extend = jax.jit(lambda params, *args: nnx.merge(graphdef, params).extend(*args))
        self.forward = lambda tokens, segments=None: forward(params, tokens, segments)
        self.extend = lambda tokens, cache, segments=None: extend(params, tokens, cache, segments)

    def alone(self, tokens: np.ndarray) -> np.ndarray:
        """Logits of a row by itself. Tokens behind it, on which nothing depends, give all rows one length."""
        return np.asarray(self.forward(np.pad(tokens, (0, LONGEST - len(tokens)))[None]))[0, : len(tokens)]


def random_tokens(rows: int, tokens: int = TOKENS, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (rows, tokens), 0, 31)


# Tokens read by one call: at and above the chunk and the window; with single steps, which are below, a number of every
# remainder by the chunk. Whole rows are read by one call below.
LENGTHS = (4, 6, 7)


def test_one_pass_equals_prefill_and_steps_at_every_split(functions):
    """Calls of several lengths that start at every token, and steps after each that go on to the end."""
    tokens = np.asarray(random_tokens(2))  # whose slices, unlike JAX's, are no programs to compile
    whole = np.asarray(functions.forward(tokens))
    read = functions.model.init_cache(2, TOKENS)
    for t in range(TOKENS):  # `read` holds the first t tokens, read one by one
        for length in LENGTHS:
            end = t + length
            if end > TOKENS:
                continue
            part, cache = functions.extend(tokens[:, t:end], read)
            np.testing.assert_allclose(part, whole[:, t:end], atol=ATOL, rtol=0)
            for later in range(end, TOKENS):
                step, cache = functions.extend(tokens[:, later : later + 1], cache)
                np.testing.assert_allclose(step, whole[:, later : later + 1], atol=ATOL, rtol=0)
        step, read = functions.extend(tokens[:, t : t + 1], read)
        np.testing.assert_allclose(step, whole[:, t : t + 1], atol=ATOL, rtol=0)


@pytest.mark.parametrize("left", [False, True], ids=["padded-right", "padded-left"])
def test_ragged_rows_equal_each_row_alone(functions, left):
    lengths = [1, 4, 9, TOKENS]
    tokens = np.asarray(random_tokens(len(lengths)))
    columns = np.arange(TOKENS)[None]
    lengths_column = np.array(lengths)[:, None]
    segments = (columns >= TOKENS - lengths_column) if left else (columns < lengths_column)
    segments = np.array(segments, np.int32)
    logits, cache = functions.extend(tokens, functions.model.init_cache(4, 32), segments)
    more = np.asarray(random_tokens(len(lengths), LATER, seed=1))
    # The second part is ragged too, and padded on the other side.
    more_segments = np.array([[1] * 7, [0] * 3 + [1] * 4, [0] * 7, [1] * 7], np.int32)
    more_logits, _ = functions.extend(more, cache, more_segments)
    logits, more_logits = np.asarray(logits), np.asarray(more_logits)
    for row in range(len(lengths)):
        first, second = segments[row] == 1, more_segments[row] == 1
        alone = functions.alone(np.concatenate([tokens[row][first], more[row][second]]))
        batched = np.concatenate([logits[row][first], more_logits[row][second]])
        np.testing.assert_allclose(batched, alone, atol=ATOL, rtol=0)


SEGMENTS = [[1] * 3 + [2] * 6 + [0] * 2 + [1] * 3, [4] * 1 + [2] * 5 + [4] * 8]  # ids come again


def documents(row: int) -> list[np.ndarray]:
    """Masks of the documents of a row."""
    ids = np.array(SEGMENTS[row])
    edges = [0, *(np.flatnonzero(np.diff(ids)) + 1), len(ids)]
    spans = [(a, b) for a, b in itertools.pairwise(edges) if ids[a]]
    return [(np.arange(len(ids)) >= a) & (np.arange(len(ids)) < b) for a, b in spans]


def test_packed_documents_equal_each_alone(functions):
    tokens, segments = np.asarray(random_tokens(2)), np.array(SEGMENTS, np.int32)
    packed = np.asarray(functions.forward(tokens, segments))
    _, first_cache = functions.extend(tokens[:, :7], functions.model.init_cache(2, TOKENS), segments[:, :7])
    cached = np.asarray(functions.extend(tokens[:, 7:], first_cache, segments[:, 7:])[0])
    for row in range(2):
        for inside in documents(row):
            alone = functions.alone(tokens[row][inside])
            np.testing.assert_allclose(packed[row][inside], alone, atol=ATOL, rtol=0)
            later = int(inside[7:].sum())
            np.testing.assert_allclose(cached[row][inside[7:]], alone[len(alone) - later :], atol=ATOL, rtol=0)


def test_no_token_depends_on_a_later_one_or_on_another_document(functions):
    tokens, segments = random_tokens(1), jnp.array(SEGMENTS[:1])
    graphdef, params = nnx.split(functions.model)

    def one_logit(offsets, at, segments):
        model = nnx.merge(graphdef, params)
        # Offsets of the embedded tokens: what the logit at `at` depends on has a gradient.
        embed = model.embed
        object.__setattr__(model, "embed", lambda tokens: embed(tokens) + offsets)
        return model(tokens, segments)[0, at, 3]

    gradient = jax.jit(jax.grad(one_logit))
    offsets = jnp.zeros((1, TOKENS, functions.model.config.width))
    for at in (0, 3, 4, TOKENS - 1):
        reached = np.abs(gradient(offsets, at, None)).max(axis=(0, 2)) > 0
        assert not reached[at + 1 :].any()
        assert reached[at]
    for at in (2, 3, 8, 12):
        reached = np.abs(gradient(offsets, at, segments)).max(axis=(0, 2)) > 0
        (inside,) = [inside for inside in documents(0) if inside[at]]
        assert not reached[~inside].any()
        assert reached[at]


def test_padding_changes_nothing_and_gradients_stay_finite(functions):
    graphdef, params = nnx.split(functions.model)
    tokens, segments = random_tokens(2), jnp.array([[0] * TOKENS, [0] * 3 + [1] * 6 + [0] * 5])

    @jax.jit
    def gradients(tokens):
        def loss(params):
            logits = nnx.merge(graphdef, params)(tokens, segments)
            return jnp.sum(jnp.where((segments == 1)[..., None], logits, 0.0) ** 2)

        return jax.grad(loss)(params)

    first = gradients(tokens)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(first))
    other = jnp.where(segments == 1, tokens, (tokens + 5) % 31)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(gradients(other)), strict=True):
        np.testing.assert_array_equal(a, b)


def gradients_of_four_layers(**changes) -> list[jax.Array]:
    tokens = random_tokens(2, 12)
    graphdef, params = nnx.split(small_model(("rnn", "local_attention"), num_layers=4, **changes))
    gradients = jax.jit(jax.grad(lambda params: jnp.sum(nnx.merge(graphdef, params)(tokens) ** 2)))
    return jax.tree.leaves(gradients(params))


@pytest.fixture(scope="module")
def plain_gradients():
    return gradients_of_four_layers()


@pytest.mark.parametrize(
    "changes",
    [
        {"remat": "block"},
        pytest.param({"remat": "dots"}, marks=pytest.mark.slow),  # the next does this and more
        {"remat": "dots", "scan_unroll": 9},
    ],
    ids=str,
)
def test_how_layers_run_changes_no_gradient(plain_gradients, changes):
    for a, b in zip(plain_gradients, gradients_of_four_layers(**changes), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max())


def test_bfloat16_stays_near_float32():
    tokens = random_tokens(2)
    pattern = ("rat", "local_attention")
    exact = Functions(small_model(pattern)).forward(tokens)
    rounded = Functions(small_model(pattern, dtype="bfloat16")).forward(tokens)
    assert rounded.dtype == jnp.float32
    assert np.sqrt(np.mean((rounded - exact) ** 2)) < 0.05 * np.std(exact)


def test_parameters_are_stacked_float32_and_named_by_place():
    state = nnx.state(small_model(("rat", "local_attention"), num_layers=4))
    shapes = {"/".join(path): (param[...].shape, param[...].dtype) for path, param in nnx.to_flat_state(state)}
    assert shapes["blocks/00_rat/mixer/in_proj/kernel"] == ((2, 16, 3 * 16 + 2 * 2 * 4), jnp.float32)
    assert shapes["blocks/01_local_attention/mlp/up/kernel"] == ((2, 16, 32), jnp.float32)
    assert all(dtype == jnp.float32 for _, dtype in shapes.values())


def test_compiled_size_does_not_grow_with_depth():
    def operations(layers):
        graphdef, params = nnx.split(small_model(("rat", "local_attention"), num_layers=layers))
        lowered = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens)).lower(params, random_tokens(1))
        return lowered.as_text().count("\n")

    assert operations(4) == operations(8)


def test_layers_alike_are_traced_once():
    """However many repeats of the pattern a decoder has, its programs hold a function for each place in it."""
    decoder = small_model(("rat", "local_attention"), num_layers=6).decoder()
    cache = decoder.init_cache(1, 8)

    def read(arrays, tokens, cache):
        return decoder.layout.merge(arrays).hidden(tokens, cache)

    traced = jax.make_jaxpr(read)(decoder.arrays, jnp.ones((1, 2), jnp.int32), cache)
    layers = [equation.params["jaxpr"] for equation in traced.eqns if equation.params.get("name") == "_run_layer"]
    assert len(layers) == 6
    assert len({id(layer) for layer in layers}) == 2
