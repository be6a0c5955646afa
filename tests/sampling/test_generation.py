"""Generated tokens: equal to the model's own predictions, to each row alone, and repeatable."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import monitoring
from jax.sharding import NamedSharding, PartitionSpec

from rat_jax.config import MeshConfig
from rat_jax.sampling import SamplingError, SamplingStopped, generate
from rat_jax.sampling.caches import cache_capacity
from rat_jax.sampling.device_rows import DeviceRows
from rat_jax.sampling.slots import STEPS_PER_CALL
from rat_jax.sharding import make_mesh
from tests.small import small_model

VOCAB = 31
NEW = STEPS_PER_CALL + 4  # more than one device call
LENGTHS = [1, 3, 4, 9, 12]  # chunks of the models have 4 tokens, windows 5; one cache size and one prefill for all


# tests/sampling/test_engine.py has every kind by itself.
@pytest.fixture(
    scope="module",
    params=[("rat", "local_attention"), pytest.param(("attention", "rnn"), marks=pytest.mark.slow)],
    ids="+".join,
)
def model(request):
    return small_model(request.param)


@pytest.fixture(scope="module")
def rat_model():
    return small_model(("rat", "local_attention"))


def make_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCAB, length).tolist() for length in lengths]


PROMPTS = make_prompts(LENGTHS)
SAMPLED = {"temperature": 1.5, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.2}


def test_greedy_tokens_are_the_argmax_of_one_pass(model):
    results = generate(model, PROMPTS, max_new_tokens=NEW)
    rows = [prompt + result for prompt, result in zip(PROMPTS, results, strict=True)]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    graphdef, params = nnx.split(model)
    forward = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))
    likeliest = np.asarray(forward(params, tokens).argmax(axis=-1))
    for row, (prompt, result) in enumerate(zip(PROMPTS, results, strict=True)):
        assert len(result) == NEW
        assert likeliest[row, len(prompt) - 1 : len(prompt) + NEW - 1].tolist() == result


# Greedy rows beside others are in tests/sampling/test_engine.py.
@pytest.mark.parametrize("settings", [pytest.param({}, marks=pytest.mark.slow), SAMPLED], ids=["greedy", "sampled"])
def test_batched_equals_one_by_one(rat_model, settings):
    together = generate(rat_model, PROMPTS, max_new_tokens=NEW, **settings)
    alone = [generate(rat_model, [prompt], max_new_tokens=NEW, **settings)[0] for prompt in PROMPTS]
    assert together == alone


def test_order_and_batch_size_do_not_matter(rat_model):
    together = generate(rat_model, PROMPTS, max_new_tokens=NEW, **SAMPLED)
    reversed_ = generate(rat_model, PROMPTS[::-1], max_new_tokens=NEW, batch_size=1, **SAMPLED)
    assert reversed_[::-1] == together


def test_equal_prompts_get_different_samples_that_repeat(rat_model):
    prompts = [[5, 6]] * 5
    first = generate(rat_model, prompts, max_new_tokens=NEW, seed=7, **SAMPLED)
    assert len({tuple(row) for row in first}) == 5
    assert generate(rat_model, prompts, max_new_tokens=NEW, seed=7, **SAMPLED) == first
    assert generate(rat_model, prompts, max_new_tokens=NEW, seed=7, batch_size=1, **SAMPLED) == first
    other_seed = generate(rat_model, prompts, max_new_tokens=NEW, seed=8, **SAMPLED)
    assert not {tuple(row) for row in first} & {tuple(row) for row in other_seed}


def test_samples_do_not_depend_on_the_number_of_steps(rat_model):
    longer = generate(rat_model, PROMPTS, max_new_tokens=NEW, **SAMPLED)
    for count in (1, STEPS_PER_CALL + 1, NEW - 1):
        assert generate(rat_model, PROMPTS, max_new_tokens=count, **SAMPLED) == [row[:count] for row in longer]


def test_the_end_of_a_document_ends_a_row_and_is_left_out(rat_model):
    free = generate(rat_model, PROMPTS, max_new_tokens=NEW, **SAMPLED)
    eos_id = free[2][5]
    ended = generate(rat_model, PROMPTS, max_new_tokens=NEW, eos_id=eos_id, **SAMPLED)
    assert len(ended[2]) <= 5
    assert ended == [row[: row.index(eos_id)] if eos_id in row else row for row in free]


def test_a_first_token_that_ends_all_rows(rat_model):
    token = generate(rat_model, PROMPTS[:1], max_new_tokens=NEW)[0][0]
    assert generate(rat_model, PROMPTS[:1], max_new_tokens=NEW, eos_id=token) == [[]]


@pytest.mark.parametrize("ending", [False, True])
def test_streamed_tokens_are_the_result(rat_model, ending):
    eos_id = generate(rat_model, PROMPTS, max_new_tokens=NEW, **SAMPLED)[2][5] if ending else None
    parts: list[list[list[int]]] = [[] for _ in PROMPTS]
    results = generate(
        rat_model,
        PROMPTS,
        max_new_tokens=NEW,
        eos_id=eos_id,
        batch_size=1,
        on_tokens=lambda row, tokens: parts[row].append(tokens),
        **SAMPLED,
    )
    assert [list(itertools.chain(*row)) for row in parts] == results
    for row in parts:
        assert row[-1] == [] and all(row[:-1])  # the end is told once, after all tokens


def test_prompts_of_many_lengths_and_other_settings_compile_nothing_new(rat_model):
    compiled = []

    def listen(event, secs, **details):
        if event.endswith("/backend_compile_duration"):
            compiled.append(details)

    for longest in (1, 12):  # caches of both sizes
        generate(rat_model, make_prompts([1, 1, 1, 1, longest]), max_new_tokens=NEW, **SAMPLED)
    monitoring.register_event_duration_secs_listener(listen)
    try:
        for longest in range(1, 13):
            prompts = make_prompts([1, 1, 1, 1, longest], seed=longest)
            generate(rat_model, prompts, max_new_tokens=NEW, eos_id=longest, seed=longest, **SAMPLED | {"top_p": 0.5})
        assert compiled == []
        generate(rat_model, PROMPTS[:2], max_new_tokens=NEW, **SAMPLED)
        assert compiled != []
    finally:
        monitoring.unregister_event_duration_listener(listen)


def test_cache_sizes_are_few_and_large_enough():
    capacities = {cache_capacity(num_tokens) for num_tokens in range(1, 4097)}
    assert all(num_tokens <= cache_capacity(num_tokens) for num_tokens in range(1, 4097))
    assert len(capacities) < 40
    assert cache_capacity(4096) == 4096


def test_the_decoder_is_the_model_in_its_compute_dtype():
    model = small_model(("rat", "local_attention"), dtype="bfloat16")
    tokens = jnp.array(make_prompts([8, 8]))
    graphdef, params = nnx.split(model)
    decoder = model.decoder()

    @jax.jit
    def both(params, arrays):
        model, module = nnx.merge(graphdef, params), decoder.layout.merge(arrays)
        hidden, _ = module.hidden(tokens, module.init_cache(2, 8))
        return model.extend(tokens, model.init_cache(2, 8))[0], module.logits(hidden)

    np.testing.assert_array_equal(*both(params, decoder.arrays))
    leaves = decoder.arrays
    assert {x.dtype for x in leaves if x.ndim >= 2} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in leaves if x.ndim == 1} == {jnp.dtype("float32")}


def test_a_model_on_a_mesh_continues_prompts_again(rat_model):
    """The set of its devices, which JAX keeps, is left as it is."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1])
    graphdef, params = nnx.split(rat_model)
    on_mesh = nnx.merge(graphdef, jax.device_put(params, NamedSharding(mesh, PartitionSpec())))
    want = generate(rat_model, PROMPTS[:1], max_new_tokens=1)
    assert [generate(on_mesh, PROMPTS[:1], max_new_tokens=1) for _ in range(2)] == [want, want]


def test_no_prompts():
    assert generate(small_model(("rnn",)), [], max_new_tokens=3) == []


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, "prompt 1 has no tokens"),
        ([[1], [2, VOCAB, 3]], {}, "prompt 1, position 1: token id 31 is outside the vocabulary of 31"),
        ([[1, 2, -1]], {}, "prompt 0, position 2: token id -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        (
            [[1]],
            {"temperature": -0.5},
            "temperature must be 0, which takes the likeliest token, or 1e-06 or more, got -0.5",
        ),
        ([[1]], {"temperature": float("nan")}, "temperature must be 0, .* got nan"),
        ([[1]], {"top_k": 0}, "top_k must be 1 or more, got 0"),
        ([[1]], {"temperature": 1e-40}, "temperature must be 0, .* got 1e-40"),
        ([[1]], {"top_p": 0.0}, "top_p must lie between 1e-06 and 1, got 0.0"),
        ([[1]], {"top_p": 1e-40, "temperature": 1.0}, "top_p must lie between 1e-06 and 1, got 1e-40"),
        ([[1]], {"top_p": 0.9}, "top_p 0.9 has no effect at temperature 0, which always takes the likeliest token"),
        ([[1]], {"top_k": 9}, "top_k 9 has no effect at temperature 0"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty must lie between 0.001 and 1000.0, got 0.0"),
        ([[1]], {"max_new_tokens": 2**31}, r"are more than 2\*\*31 - 1, up to which positions are counted"),
        (
            [[1], [2]],
            {"max_new_tokens": 2**30},
            r"the caches of 2 prompts .* take [\d,.]+ GiB, the device has 1\.\d* GiB",
        ),
        ([[1]], {"first": -1}, "first must be 0 or more, got -1"),
        ([[1]], {"seed": -1}, "seed must lie between"),
        ([[1]], {"eos_id": VOCAB}, "eos_id 31 is outside the vocabulary of 31"),
        ([[1]], {"batch_size": 0}, "batch_size must be 1 or more, got 0"),
    ],
)
def test_what_cannot_be_sampled_is_refused(rat_model, prompts, settings, message, monkeypatch):
    # Some machines have room for all that is asked for.
    monkeypatch.setattr("rat_jax.sampling.device_rows.free_bytes", lambda device: 2**30)
    with pytest.raises(SamplingError, match=message):
        generate(rat_model, prompts, **{"max_new_tokens": 2} | settings)


def test_what_was_continued_earlier_still_counts():
    model = small_model(("rnn",))  # compiles quickly
    prompts = [[1, 2], [3], [1, 2], [1, 2]]
    shown: dict[int, list[int]] = {}
    settings = {"max_new_tokens": 5, "batch_size": 1, **SAMPLED}
    whole = generate(model, prompts, **settings)
    rest = generate(
        model, prompts, first=2, on_tokens=lambda row, tokens: shown.setdefault(row, []).extend(tokens), **settings
    )
    assert rest == whole[2:]
    assert shown == {2: whole[2], 3: whole[3]}
    assert generate(model, prompts, first=4, **settings) == []


def test_a_device_that_runs_out_of_memory_is_a_message(rat_model, monkeypatch):
    def refuse(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(DeviceRows, "step", refuse)
    settings = r"lower batch_size \(num_slots, 2\), max_new_tokens .* \(capacity, 16 .*\), or .* \(chunk_sizes, 16 .*\)"
    message = f"2 prompts at a time are more than the device has memory for: {settings}"
    with pytest.raises(SamplingStopped, match=message):
        generate(rat_model, [[1], [2]], max_new_tokens=2)


def test_logits_that_are_not_finite_are_refused():
    model = small_model(("rnn",))
    model.final_norm.scale[...] = model.final_norm.scale[...] * np.nan
    with pytest.raises(SamplingError, match="prompt 0: the logits of new token 0 are not finite"):
        generate(model, [[1], [2]], max_new_tokens=2)
