"""Files of results that hold something else than they should."""

import json
import re

import pytest

from tests.report.workdirs import add_scores, evaluation, make_workdir, page_of


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is damaged: Expecting"),
        ("[1]", "expected a JSON object, got [1]"),
        ('{"step": 6}', "holds no results that this page shows"),
        ('{"step": 6, "loss_beyond": 1}', "it has no trained_length"),
        ('{"step": 6, "results": [{"task": "niah"}]}', "it has no context_length"),
        (
            '{"step": 6, "results": [{"task": "niah", "context_length": 9, "scores": {"x": "y"}}]}',
            "value must be a finite number, got 'y'",
        ),
        ('{"step": 6, "num_prompts": "all", "scores": {"x": 1}}', "num must be a whole number or None, got 'all'"),
        ('{"step": "6", "data_path": "", "data_hash": "", "evaluations": [EVALUATION]}', "step must be a whole number"),
        ('{"step": 6, "evaluations": [{"loss": 1}]}', "it has no context_length"),
        ('{"step": 6, "evaluations": 7}', "evaluations must be a list"),
        ('{"step": 6, "data_path": 7, "evaluations": [EVALUATION]}', "data_path and data_hash must be texts"),
        ('{"step": 6, "tasks": {"arc": {"results": []}}}', "results must be an object"),
        ('{"step": 6, "tasks": {"arc": 1}}', "arc must be an object"),
        ('{"step": 6, "scores": {"rows": []}}', "scores have no title"),
        ('{"step": 6, "scores": {"title": "x", "rows": [{"name": "x", "metric": "y"}]}}', "it has no value"),
        (
            '{"step": 6, "scores": {"title": "x", "rows": [{"name": "", "metric": "", "value": NaN}]}}',
            "value must be a finite number, got nan",
        ),
        (
            '{"step": 6, "scores": {"title": "x", "rows": [{"name": "", "metric": "", "value": 1' + "0" * 400 + "}]}}",
            "value must be a finite number, got 1000",
        ),
        ('{"step": 6, "data_path": "", "data_hash": "", "evaluations": [HUGE]}', "loss is 1e+308"),
    ],
    ids=lambda text: re.sub(r"[^\w ]", "", text)[:40],
)
def test_a_damaged_result_is_left_out_and_named(tmp_path, content, reason):
    path = make_workdir(tmp_path / "run")
    huge = evaluation(16, 2.0) | {"loss": 1e308}
    content = content.replace("EVALUATION", json.dumps(evaluation(16, 2.0))).replace("HUGE", json.dumps(huge))
    (path / "evaluation-6-mine-16-abc.json").write_text(content)
    add_scores(path, "RULER", [{"name": "niah", "metric": "match", "value": 0.5}])
    shown = page_of(path)
    (note,) = (note for note in shown.notes if note.startswith("run: left out: evaluation-6-mine-16-abc.json"))
    assert reason in note
    assert shown.cells("RULER") == {"niah match": {"run step 6": "0.5000"}}
