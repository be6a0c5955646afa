"""Damage drawn at random: there is a page about whatever is left, or one line that says why there is none."""

import json
import random

import pytest

from rat_jax.errors import RatJaxError
from tests.data.damage import damaged, damaged_values
from tests.report.workdirs import (
    add_answers,
    add_evaluations,
    add_lengths,
    add_ruler,
    add_scores,
    add_tasks,
    evaluation,
    make_workdir,
    page_of,
    ruler_result,
)

_ROUNDS = 4


def make_measured(path):
    """A run with results of every kind."""
    make_workdir(path)
    add_evaluations(path, evaluation(16, 2.0, bits=1.0))
    add_lengths(path, 2.0, 3.0)
    add_tasks(path, {"arc": (0.5, 0.1, 3)}, groups={"csr": {"bos": "empty"}})
    add_ruler(path, ruler_result("niah", 16, 50.0, 1.0))
    add_answers(path, rouge_l=3.0)
    add_scores(path, "Passkeys", [{"name": "a", "metric": "b", "value": 1.0, "stderr": 0.1, "num": 3}], "keys-6.json")
    return path


@pytest.mark.parametrize(
    "kind", ["log.jsonl", "tokenizer_info", "evaluation", "length", "tasks", "ruler", "answers", "keys"]
)
def test_any_damage_leaves_a_page_or_a_message(tmp_path, kind):
    path, other = make_measured(tmp_path / "run"), make_measured(tmp_path / "other")
    (file,) = (file for file in path.rglob("*.json*") if file.name.startswith(kind))
    content = file.read_bytes()
    generator = random.Random(kind)
    for count in range(_ROUNDS):
        if count % 2:
            file.write_bytes(damaged(content, generator))
        else:
            lines = content.splitlines() if file.suffix == ".jsonl" else [content]
            values = [damaged_values(json.loads(line), generator) for line in lines]
            file.write_text("\n".join(map(json.dumps, values)))
        try:
            page = page_of(path, other)
        except RatJaxError as error:
            assert str(path) in str(error)
        else:
            assert page.headings[0] == "2 runs: run, other"
