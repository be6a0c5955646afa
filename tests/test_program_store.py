"""Programs that are found without tracing: of the same sources, devices, settings and arguments alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rat_jax import program_store
from rat_jax.compilation_cache import ProgramFiles
from rat_jax.program_store import ProgramStore
from rat_jax.sampling import Engine, Request
from rat_jax.sampling.sampling_params import SamplingParams
from tests.small import small_model, small_model_config

CONFIG = small_model_config(("rat",))
PROMPTS = ([3, 1, 4, 1, 5], [9, 2, 6], [5] * 11, [8])


@functools.partial(jax.jit, static_argnames="factor")
def scaled(factor, pair):
    return {"first": factor * pair[0], "second": pair[1]}


PAIR = (jnp.arange(3.0), jnp.ones((2,), jnp.int32))


@pytest.fixture
def store(tmp_path):
    program_store._environment.cache_clear()
    yield ProgramStore(ProgramFiles(tmp_path), CONFIG)
    program_store._environment.cache_clear()


def keep(store):
    key = store.key(scaled, PAIR)
    store.compile(key, scaled.lower(3.0, PAIR))
    return key


def test_a_program_is_found_and_gives_the_same(store):
    found = store.get(keep(store), jax.devices()[:1])
    result = found(PAIR)
    np.testing.assert_array_equal(result["first"], 3 * np.arange(3))
    np.testing.assert_array_equal(result["second"], [1, 1])


def test_nothing_is_found_that_was_not_kept(store):
    assert store.get(store.key(scaled, PAIR), jax.devices()[:1]) is None


OTHERS = {
    "shape": lambda store: store.key(scaled, (jnp.arange(4.0), PAIR[1])),
    "dtype": lambda store: store.key(scaled, (PAIR[0].astype(jnp.bfloat16), PAIR[1])),
    "structure": lambda store: store.key(scaled, list(PAIR)),
    "function": lambda store: store.key(jax.jit(keep), PAIR),
    "config": lambda store: ProgramStore(store._files, dataclasses.replace(CONFIG, width=32)).key(scaled, PAIR),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_have_other_keys(store, name):
    assert store.key(scaled, PAIR) == ProgramStore(store._files, CONFIG).key(scaled, PAIR)
    assert OTHERS[name](store) != store.key(scaled, PAIR)


def change_a_source(monkeypatch, tmp_path):
    file = tmp_path / "mixer.py"
    file.write_text("from elsewhere")
    sources = program_store._sources()
    monkeypatch.setattr(program_store, "_sources", lambda: [*sources, file])


CHANGES = {
    "a source": change_a_source,
    "a version": lambda patch, _: patch.setattr(program_store.importlib.metadata, "version", lambda name: "99"),
    "a flag of XLA": lambda patch, _: patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true"),
    "the devices": lambda patch, _: patch.setattr(jax, "devices", lambda: [jax.local_devices()[0]] * 2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_after_a_change_of_the_environment_nothing_is_found(store, monkeypatch, tmp_path, name):
    before = store.key(scaled, PAIR)
    CHANGES[name](monkeypatch, tmp_path)
    program_store._environment.cache_clear()
    assert ProgramStore(store._files, CONFIG).key(scaled, PAIR) != before


def test_after_a_setting_of_jax_nothing_is_found(store):
    before = store.key(scaled, PAIR)
    with jax.default_matmul_precision("float32"):
        program_store._environment.cache_clear()
        assert ProgramStore(store._files, CONFIG).key(scaled, PAIR) != before


def test_sources_are_those_of_the_project_and_of_all_mixers():
    names = {file.name for file in program_store._sources()}
    assert {"decoder.py", "rat.py", "rattention.py", "triton_decode.py", "engine.py", "slots.py"} <= names


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x04N."], ids=["empty", "text", "none"])
def test_what_cannot_be_loaded_is_said_and_not_found(store, capsys, content):
    key = keep(store)
    store._files.put(key, content)
    assert store.get(key, jax.devices()[:1]) is None
    assert "a program is compiled again, as it cannot be loaded: " in capsys.readouterr().err


def continued(store):
    """What an engine gives, and how many functions were traced for it."""
    engine = Engine(
        small_model(CONFIG.pattern).decoder(),
        num_slots=2,
        capacity=32,
        rule=SamplingParams.of(0.8),
        eos_id=None,
        chunk_sizes=(8,),
    )
    traced = []
    lowered = jax.stages.Traced.lower

    def count(self, *arguments, **settings):
        traced.append(self.fun_name)
        return lowered(self, *arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Traced, "lower", count)
        engine.compile(store=store)
    texts: dict[int, list[int]] = {}
    for event in engine.serve(Request(prompt, 9) for prompt in PROMPTS):
        texts.setdefault(event.request, []).extend(event.tokens)
    return texts, traced


def test_an_engine_traces_nothing_the_second_time_and_gives_the_same(store):
    expected, _ = continued(None)
    first, made = continued(store)
    jax.clear_caches()
    second, again = continued(store)
    assert first == second == expected
    assert len(expected) == len(PROMPTS)
    assert set(made) == {"read_chunk", "insert", "decode_block", "first_tokens"}
    assert again == []
