"""Scores by task, length and depth: of readers whose answers are known."""

import json

import numpy as np
import pytest

from rat_jax.errors import RatJaxError
from rat_jax.evaluation import EvaluationError
from rat_jax.evaluation.ruler.evaluation import RulerResults, describe, task_names
from rat_jax.evaluation.ruler.examples import TASKS
from rat_jax.evaluation.ruler.heat_map import draw_heat_map, has_depths, heat_grid
from rat_jax.evaluation.ruler.measurement import Failure, measure
from rat_jax.evaluation.ruler.scoring import METRICS
from rat_jax.evaluation.ruler.table import table
from tests.evaluation.ruler.reader import place_of, read_answers

LENGTHS = (1024, 2048)


def run(answer, tokenizers, settings, tasks=TASKS, lengths=LENGTHS, num_examples=11):
    parts = [settings(context_length=length, num_depths=11) for length in lengths]
    given = []
    settings = {"num_examples": num_examples, "batch_tokens": 4 * 1024, "on_result": given.append}
    found = measure(answer, tokenizers["bytes"], tasks, parts, **settings)
    assert given == found
    return RulerResults(describe(parts[0], tokenizers["bytes"]) | {"num_examples": num_examples}, found)


def oracle(examples, batch_size=1):
    return [", ".join(sorted(read_answers(example.prompt))) for example in examples]


def near_reader(examples, batch_size):
    """Finds what stands in the second half of the haystack."""
    return [" ".join(v for v in read_answers(e.prompt) if place_of(e.prompt, v) > 0.55) for e in examples]


@pytest.fixture(scope="module")
def perfect(tokenizers, settings):
    return run(oracle, tokenizers, settings)


def test_a_reader_of_the_prompt_is_always_right(perfect):
    assert len(perfect.measurements) == len(TASKS) * len(LENGTHS)
    for measurement in perfect.measurements:
        assert {metric: measurement.mean(metric) for metric in METRICS} == dict.fromkeys(METRICS, 100.0)
        assert measurement.standard_error("exact_match") == 0


def test_a_constant_answer_is_never_right(tokenizers, settings):
    found = run(
        lambda examples, batch_size: ["The answer is 42."] * len(examples), tokenizers, settings, lengths=(1024,)
    )
    for measurement in found.measurements:
        assert {metric: measurement.mean(metric) for metric in METRICS} == dict.fromkeys(METRICS, 0.0)


def test_answers_by_depth(tokenizers, settings, tmp_path):
    found = run(near_reader, tokenizers, settings, tasks=["niah_single_1", "niah_multiquery"], lengths=(4096, 2048))
    lengths, grid = heat_grid(found, "niah_single_1")
    assert lengths == [2048, 4096]
    assert grid.shape == (11, 2)
    np.testing.assert_array_equal(grid[:5], 0)
    np.testing.assert_array_equal(grid[7:], 1)
    single, several = found.measurements[:2]
    assert single.mean("string_match_all") == pytest.approx(
        100 * sum(count.num_found for count in single.by_depth()) / 11
    )
    assert 0 < single.standard_error("string_match_all") < 20
    assert sum(count.num_answers for count in several.by_depth()) == 44
    draw_heat_map(found, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_the_table(perfect):
    lines = table(perfect).splitlines()
    assert lines[0].startswith("RULER, 11 examples of the validation split, greedy; prompts from rat_jax (Apache-2.0)")
    assert lines[2].split() == ["string_match_all,", "%", "1024", "2048"]
    assert lines[3].split() == ["niah_single_1", "100.0", "100.0"]
    assert lines[3 + len(TASKS)].split() == ["mean", "100.0", "100.0"]


def test_results_as_json(perfect):
    values = json.loads(json.dumps(perfect.as_json(), allow_nan=False))
    assert values["measured"]["split"] == "validation"
    first = values["results"][0]
    assert (first["task"], first["context_length"], first["num_examples"]) == ("niah_single_1", 1024, 11)
    assert first["scores"] == dict.fromkeys(METRICS, 100.0)
    assert first["by_depth"][0] == {"depth": 0.0, "num_answers": 1, "num_found": 1}
    assert first["predictions"][0]["prediction"] == first["predictions"][0]["answers"][0]
    assert 1024 * 0.98 - 128 <= first["prompt_tokens"][0] <= first["prompt_tokens"][1] <= 1024 - 128


def test_one_task_that_fails_does_not_stop_the_others(tokenizers, settings):
    def answer(examples, batch_size):
        if examples[0].task == "fwe":
            raise RatJaxError("no memory")
        return oracle(examples)

    found = run(answer, tokenizers, settings, tasks=["cwe", "fwe", "vt"], lengths=(900, 1024), num_examples=1)
    assert [(f.task, f.context_length) for f in found.failures] == [("cwe", 900), ("fwe", 900), ("fwe", 1024)]
    text = table(found)
    assert "cwe at 900 failed: cwe does not fit 900 tokens" in text
    assert "fwe at 1024 failed: no memory" in text
    assert [line.split() for line in text.splitlines()[3:5]] == [["cwe", "-", "100.0"], ["vt", "100.0", "100.0"]]
    assert "mean" not in text  # of tasks that are not all there
    assert found.as_json()["results"][0]["error"].startswith("cwe does not fit")
    assert found.measurements[0].standard_error("exact_match") is None


@pytest.mark.parametrize(
    ("batch_tokens", "sizes"), [(1, {(64, 1), (6, 1)}), (3072, {(66, 3), (4, 3)}), (10**6, {(70, 976)})]
)
def test_examples_are_made_a_group_at_a_time(tokenizers, settings, batch_tokens, sizes):
    asked, indices = [], []

    def answer(examples, batch_size):
        asked.append((len(examples), batch_size))
        indices.extend(example.index for example in examples)
        return oracle(examples)

    parts = [settings(context_length=1024)]
    measured = {"num_examples": 70, "batch_tokens": batch_tokens, "on_result": lambda result: None}
    (one,) = measure(answer, tokenizers["bytes"], ["niah_single_1"], parts, **measured)
    assert set(asked) == sizes
    assert indices == [answered.index for answered in one.answered] == list(range(70))
    assert one.mean("exact_match") == 100


def test_tasks_without_needles_have_no_map(tokenizers, settings):
    assert not has_depths(run(oracle, tokenizers, settings, tasks=["cwe", "fwe"], num_examples=1))
    assert has_depths(run(oracle, tokenizers, settings, tasks=["vt"], num_examples=1))
    assert not has_depths(RulerResults({}, [Failure("vt", 5, "no")]))


def test_names_of_tasks():
    assert task_names(["ruler"]) == list(TASKS)
    assert task_names(["vt", "cwe"]) == ["vt", "cwe"]
    for names in ([], ["vt", "vt"], ["ruler", "vt"]):
        with pytest.raises(EvaluationError, match="name one or several different tasks"):
            task_names(names)


def test_what_cannot_be_measured(tokenizers, settings):
    with pytest.raises(EvaluationError, match="the number of examples must be 1 or more, got 0"):
        run(oracle, tokenizers, settings, num_examples=0)
    with pytest.raises(EvaluationError, match="there is no RULER task 'qa_1'"):
        run(oracle, tokenizers, settings, tasks=["vt", "qa_1"])
