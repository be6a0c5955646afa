"""What a user does with one model of the default size, by the commands of the README, each on what the last one left.

A corpus and its tokenizer, a training, a harness task of local data, RULER, fine-tuning, its answers, and one report.
"""

import argparse
import json
import os

import pytest

from rat_jax.data.prepare import main as prepare
from rat_jax.report.__main__ import main as report
from tests.commands import call_script
from tests.report.html_page import Page
from tests.tiny_sft import write_lines

FEW_STEPS = [
    "--config.training.num_steps=4",
    "--config.training.log_every_steps=2",
    "--config.training.validate_every_steps=4",
    "--config.training.validation_batches=2",
    "--config.data.global_batch_size=4",
]
CHOICE = {
    "task": "which",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("whole_way")


@pytest.fixture(scope="module")
def pretrained(folder):
    """The workdir of a model of configs/default.py, trained for four steps on a part of Python's library."""
    source = os.path.join(os.path.dirname(argparse.__file__), "[a-c]*.py")  # of Python's library
    assert prepare(["--source", source, "--tokenizer", "bpe:2048", "--out", str(folder / "text")]) == 0
    data = f"--config.data.path={folder / 'text'}"
    assert call_script("train.py", "--config=configs/default.py", f"--workdir={folder / 'run'}", data, *FEW_STEPS) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def tasks(pretrained, folder):
    """What eval.py writes of a harness task and of a needle."""
    file = write_lines(
        folder / "tasks" / "which.jsonl",
        [{"question": f"{n} + 1 =", "options": [f"{n}", f"{n + 1}", f"{n + 2}"], "answer": 1} for n in range(3)],
    )
    values = CHOICE | {"dataset_kwargs": {"data_files": {"test": str(file)}}}
    (folder / "tasks" / "which.yaml").write_text(json.dumps(values))  # JSON is YAML
    workdir = f"--workdir={pretrained}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        assert call_script("eval.py", workdir, "--tasks=which", f"--tasks_dir={folder / 'tasks'}") == 0
    needle = ["--tasks=niah_single_1", "--context_lengths=448", "--limit=2", "--ruler_answer_tokens=16"]
    assert call_script("eval.py", workdir, *needle, "--ruler_templates=own") == 0
    (of_task,), (of_needle,) = (list(pretrained.glob(pattern)) for pattern in ("tasks-4-which-*", "ruler-4-*.json"))
    return json.loads(of_task.read_text()), json.loads(of_needle.read_text())


@pytest.fixture(scope="module")
def tuned(pretrained, folder):
    """The workdir of configs/sft.py from that model, and the file of questions."""
    records = [{"prompt": f"Q: {n} + {n}?\nA:", "answer": f" {2 * n}"} for n in range(1, 9)]
    files = [write_lines(folder / f"{name}.jsonl", records) for name in ("train", "validation")]
    rows = ["--rows=padded", "--seq_len=64", f"--tokenizer={pretrained / 'tokenizer'}", f"--out={folder / 'sft'}"]
    assert prepare([f"--source={files[0]}", f"--validation_source={files[1]}", *rows]) == 0
    changes = [
        f"--config.init.path={pretrained}",
        f"--config.data.path={folder / 'sft'}",
        "--config.data.seq_len=64",
        "--config.optimizer.accumulation_steps=1",
    ]
    config = "--config=configs/sft.py:default"
    assert call_script("train.py", config, f"--workdir={folder / 'tuned'}", *changes, *FEW_STEPS) == 0
    return folder / "tuned", files[1]


@pytest.fixture(scope="module")
def answered(tuned):
    """What eval.py --sft writes: scores, and predictions beside references."""
    workdir, questions = tuned
    assert call_script("eval.py", f"--workdir={workdir}", f"--sft={questions}", "--limit=3", "--max_new_tokens=8") == 0
    return sorted(workdir.glob("answers-4-*.json*"))


def test_a_model_of_the_default_size_was_trained(pretrained):
    config = json.loads((pretrained / "run.json").read_text())["config"]["model"]
    assert (config["width"], config["num_layers"], config["vocab_size"]) == (128, 4, 2048)
    assert config["pattern"] == ["rat", "local_attention"]


def test_tasks_have_figures(tasks):
    of_task, of_needle = tasks
    assert of_task["tasks"]["which"]["results"]["which"]["acc,none"] in [pytest.approx(n / 3) for n in range(4)]
    assert of_task["tasks"]["which"]["n-samples"]["which"]["effective"] == 3
    (result,) = of_needle["results"]
    assert (result["task"], result["context_length"], result["num_examples"]) == ("niah_single_1", 448, 2)


def test_answers_stand_beside_their_references(answered):
    scores, answers = answered
    assert json.loads(scores.read_text())["scores"].keys() == {"rouge_l", "token_f1", "exact_match"}
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["references"] for line in lines] == [[" 2"], [" 4"], [" 6"]]
    assert all(line["completion"] for line in lines)  # 8 tokens, of a model that has learned little


def test_one_report_shows_all_of_it(pretrained, tasks, tuned, answered, folder):
    assert report([str(pretrained), str(tuned[0]), "--out", str(folder / "report.html")]) == 0
    page = Page((folder / "report.html").read_bytes())
    assert [row[1] for row in page.tables["How far each run is"][1:]] == ["finished, 4 steps"] * 2
    accuracy = tasks[0]["tasks"]["which"]["results"]["which"]["acc,none"]
    ((name, value),) = page.tables["Tasks of the lm-evaluation-harness"][1:]
    assert name.startswith("which acc") and value.startswith(f"{accuracy:.4f}")
    assert [row[0].split(" tokens ")[0] for row in page.tables["RULER"][1:]] == ["niah_single_1, 448"] * 3
    assert page.tables["Answers to prompts"][0] == ["task", "tuned step 4"]
    (differing,) = (caption for caption in page.tables if caption.startswith("Config fields that differ"))
    assert "init.path" in [row[0] for row in page.tables[differing]]
