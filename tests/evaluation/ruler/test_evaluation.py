"""A model on RULER's tasks, from prompts to scores."""

import dataclasses

import numpy as np
import pytest

from rat_jax.data.tokenizer import ByteTokenizer
from rat_jax.evaluation import EvaluationError
from rat_jax.evaluation.ruler import Settings, evaluation, make_example, run_ruler
from rat_jax.evaluation.ruler.examples import prompt_ids
from rat_jax.evaluation.ruler.haystacks import Essay
from rat_jax.evaluation.ruler.measurement import NUM_DEPTHS, Answered
from rat_jax.evaluation.ruler.templates import OWN
from rat_jax.evaluation.ruler.words import GeneratedWords
from tests.evaluation.ruler.conftest import ESSAY
from tests.small import bigram_model, small_model

TOKENIZER = ByteTokenizer()
SETTINGS = {
    "tasks": ["niah_single_1", "vt"],
    "context_lengths": [448],
    "num_examples": 3,
    "templates": "own",
    "answer_tokens": 40,
}

MADE = Settings(448, "validation", 0, OWN, GeneratedWords(), None, NUM_DEPTHS, 40, False)  # what SETTINGS make


@pytest.fixture(scope="module")
def model():
    return small_model(("rat", "local_attention"), vocab_size=257)


@pytest.fixture(scope="module")
def together(model):
    return run_ruler(model, TOKENIZER, batch_tokens=4096, **SETTINGS)


@pytest.fixture(scope="module")
def essay(tmp_path_factory):
    path = tmp_path_factory.mktemp("essay") / "essay.txt"
    path.write_text(ESSAY)
    return str(path)


def no_answers(model, tokenizer, prompts, **settings):
    return [""] * len(prompts)


def predictions(results):
    return {one.task: list(one.predictions) for one in results.measurements}


def test_a_model_from_start_to_end(together):
    assert [one.task for one in together.results] == SETTINGS["tasks"]
    assert together.measured["templates"] == "rat_jax (Apache-2.0)"
    assert together.measured["words"] == "generated"
    for one in together.measurements:
        assert len(one.answered) == 3
        assert all(one.predictions)
        assert one.mean("exact_match") == 0


def test_padding_is_not_read(model, essay):
    """Each prompt alone has the answer that it has among others, which are of other lengths."""
    settings = SETTINGS | {"tasks": ["niah_single_2"], "essay": essay, "seed": 4}
    together = run_ruler(model, TOKENIZER, batch_tokens=4096, **settings)
    assert len({one.prompt_tokens for one in together.measurements[0].answered}) > 1
    assert len(set(together.measurements[0].predictions)) > 1
    alone = run_ruler(model, TOKENIZER, batch_tokens=1, **settings)
    assert predictions(alone) == predictions(together)


def test_the_ids_that_a_model_reads(monkeypatch, model):
    read = []

    def record(model, tokenizer, prompts, **settings):
        read.append((prompts, settings))
        return [""] * len(prompts)

    monkeypatch.setattr(evaluation, "generate_text", record)
    for bos in (False, True):
        results = run_ruler(model, TOKENIZER, batch_tokens=1000, bos=bos, **SETTINGS | {"tasks": ["niah_single_1"]})
        (one,) = results.measurements
        prompts, settings = read[-1]
        made = dataclasses.replace(MADE, bos=bos)
        examples = [make_example("niah_single_1", index, TOKENIZER, made) for index in range(3)]
        assert prompts == [prompt_ids(example, TOKENIZER, bos=bos) for example in examples]
        assert [answered.answers for answered in one.answered] == [example.answers for example in examples]
        assert [prompt.count(TOKENIZER.eos_id) for prompt in prompts] == [int(bos)] * 3
        assert callable(settings.pop("on_text"))
        assert settings == {"stop": (), "max_new_tokens": 40, "batch_size": 2}
        assert max(map(len, prompts)) + 40 <= 448
        assert results.measured["bos"] is bos


def test_answers_are_greedy():
    """Of a model in which only the last token decides what is next, the answer can be told."""
    model, table = bigram_model(vocab_size=257)
    results = run_ruler(model, TOKENIZER, batch_tokens=4096, **SETTINGS | {"tasks": ["niah_single_1"]})
    last, ids = ord("s"), []
    while len(ids) < 40 and (last := int(np.argmax(table[last]))) != TOKENIZER.eos_id:
        ids.append(last)
    assert results.measurements[0].predictions == [TOKENIZER.decode(ids)] * 3


def test_depths_go_evenly_through_a_haystack(monkeypatch, model):
    monkeypatch.setattr(evaluation, "generate_text", no_answers)
    changes = {"tasks": ["niah_single_1"], "context_lengths": [4096], "num_examples": 22}
    results = run_ruler(model, TOKENIZER, batch_tokens=1, **SETTINGS | changes)
    assert [count.num_answers for count in results.measurements[0].by_depth()] == [2] * 11


def test_results_so_far_are_given_out(monkeypatch, model):
    monkeypatch.setattr(evaluation, "generate_text", no_answers)
    given = []
    run_ruler(model, TOKENIZER, batch_tokens=1, on_result=given.append, **SETTINGS | {"context_lengths": [448, 600]})
    assert [len(results.results) for results in given] == [1, 2, 3, 4]
    assert [one.context_length for one in given[-1].results] == [448, 448, 600, 600]


def test_examples_are_those_of_the_settings(monkeypatch, model, essay):
    monkeypatch.setattr(evaluation, "generate_text", no_answers)
    changes = {"tasks": ["niah_single_2"], "split": "train", "seed": 5, "essay": essay, "bos": True}
    results = run_ruler(model, TOKENIZER, batch_tokens=1, **SETTINGS | changes)
    settings = dataclasses.replace(MADE, split="train", seed=5, essay=Essay.read(essay), bos=True)
    made = [make_example("niah_single_2", index, TOKENIZER, settings) for index in range(3)]
    assert list(results.measurements[0].answered) == [Answered.of(example, "") for example in made]
    assert (results.measured["essay"], results.measured["split"], results.measured["seed"]) == (essay, "train", 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_lengths": []}, "name one or several different context lengths"),
        ({"context_lengths": [448, 448]}, "name one or several different context lengths"),
        ({"templates": "short"}, "templates must be harness or own"),
        ({"words": "german"}, "words must be generated or wonderwords"),
        ({"tasks": ["qa_2"]}, "there is no RULER task 'qa_2'"),
        ({"answer_tokens": 0}, "answer_tokens must be 1 or more"),
    ],
)
def test_settings_that_are_refused(model, changes, message):
    with pytest.raises(EvaluationError, match=message):
        run_ruler(model, TOKENIZER, batch_tokens=1, **SETTINGS | changes)
