"""Published data sets to examples: rows in their own columns, and what to do where files are missing."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from rat_jax.data.example import read_example
from rat_jax.data.sft_tasks import TASKS, main
from tests.tiny_sft import write_lines

STORIES = [
    {
        "document": {
            "id": f"00{number}",
            "kind": "gutenberg",
            "url": "http://www.gutenberg.org/ebooks/1",
            "file_size": 12,
            "word_count": 2,
            "start": "A",
            "end": "z",
            "summary": {"text": f" A cat {number}.", "tokens": ["A", "cat"], "url": "http://x", "title": "Cat"},
            "text": "Once there was a cat.\n",
        },
        "question": {"text": "Who?", "tokens": ["Who", "?"]},
        "answers": [{"text": "A cat", "tokens": ["A", "cat"]}, {"text": "the cat ", "tokens": ["the", "cat"]}],
    }
    for number in range(3)
]
MEETINGS = [
    {"id": f"tr-sq-{number}", "pid": f"tr-sq-{number}_0", "input": "A: hi.", "output": "They met.", "prompt": "What?"}
    for number in range(3)
]
LONGBENCH = [
    {
        "input": "What did they decide?",
        "context": "A: red. B: blue.",
        "answers": ["Blue."],
        "length": 4,
        "dataset": "qmsum",
        "language": "en",
        "all_classes": None,
        "_id": f"{number}",
    }
    for number in range(3)
]
ARTICLES = [
    {
        "url": "http://x",
        "title": f"How to wait {number}",
        "summary": "Sit.",
        "article": "First, sit.",
        "step_headers": "S",
    }
    for number in range(3)
]
ROWS = [
    (
        "narrativeqa_summary",
        STORIES,
        "Story:  A cat 0.\n\nQuestion: Who?\n\nAnswer:",
        ["A cat", "the cat"],
    ),
    (
        "narrativeqa_full",
        STORIES,
        "Story:  A cat 0.\n\nOnce there was a cat.\n\n\nQuestion: Who?\n\nAnswer:",
        ["A cat", "the cat"],
    ),
    ("qmsum", MEETINGS, "Transcript: A: hi.\n\nQuestion: What?\n\nAnswer:", ["They met."]),
    ("qmsum", LONGBENCH, "Transcript: A: red. B: blue.\n\nQuestion: What did they decide?\n\nAnswer:", ["Blue."]),
    ("wikisum", ARTICLES, "Article: First, sit.\n\nQuestion: How to wait 0\n\nAnswer:", ["Sit."]),
]


def converted(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("task", "rows", "prompt", "answers"), ROWS, ids=range(len(ROWS)))
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows(tmp_path, capsys, task, rows, prompt, answers, kind):
    if kind == "jsonl":
        source = write_lines(tmp_path / "rows.jsonl", rows)
    else:
        source = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    out = tmp_path / "new" / "train.jsonl"
    assert main([task, "--source", str(source), "--out", str(out)]) == 0
    assert f"3 examples are in {out}" in capsys.readouterr().out
    examples = converted(out)
    assert len(examples) == 3 and examples[0] == {"prompt": prompt, "answer": answers}
    assert [read_example(example, "x", None).answers for example in examples] == [tuple(answers)] * 3
    assert [file.name for file in out.parent.iterdir()] == ["train.jsonl"]


def test_the_tasks_of_the_paper():
    assert list(TASKS) == ["narrativeqa_summary", "narrativeqa_full", "qmsum", "wikisum"]


@pytest.mark.parametrize("task", TASKS)
def test_missing_files_are_named_with_their_place(tmp_path, capsys, task):
    places = {"narrativeqa": "deepmind/narrativeqa", "qmsum": "pszemraj/qmsum-cleaned", "wikisum": "d0rj/wikisum"}
    place = f"huggingface.co/datasets/{places[task.split('_')[0]]}"
    for source in (["--source", str(tmp_path / "gone-*.parquet")], []):
        assert main([task, *source, "--out", str(tmp_path / "a.jsonl")]) == 2
        said = capsys.readouterr().err
        assert place in said and "--source hf:" in said and said.count("\n") == 1
        assert ("no such file" in said) == bool(source)
    assert not (tmp_path / "a.jsonl").exists()


def test_another_data_set_is_refused(tmp_path, capsys):
    source = write_lines(tmp_path / "rows.jsonl", ARTICLES)
    assert main(["narrativeqa_full", "--source", str(source), "--out", str(tmp_path / "a.jsonl")]) == 2
    assert "line 1 has no column document.summary.text (it has: url, title, summary" in capsys.readouterr().err
    assert main(["wikisum", "--source", f"text:{source}", "--out", str(tmp_path / "a.jsonl")]) == 2
    assert "holds text, not rows with columns" in capsys.readouterr().err
    write_lines(source, [{**ARTICLES[0], "summary": 3}])
    assert main(["wikisum", "--source", str(source), "--out", str(tmp_path / "a.jsonl")]) == 2
    assert "line 1: column summary must be str, got int" in capsys.readouterr().err
    write_lines(source, [{**LONGBENCH[0], "answers": [3]}])
    assert main(["qmsum", "--source", str(source), "--out", str(tmp_path / "a.jsonl")]) == 2
    assert "line 1: column answers must be str, got int" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_rows_without_an_answer_are_left_out(tmp_path, capsys):
    source = write_lines(
        tmp_path / "rows.jsonl", [*MEETINGS, {**MEETINGS[0], "output": " "}, {**MEETINGS[0], "input": None}]
    )
    out = tmp_path / "a.jsonl"
    assert main(["qmsum", "--source", str(source), "--out", str(out)]) == 0
    assert "2 rows are left out: they have no answer, or no context" in capsys.readouterr().out
    assert len(converted(out)) == 3
    assert main(["qmsum", "--source", str(source), "--out", str(out)]) == 2
    assert "is there already; it is left as it is" in capsys.readouterr().err


def test_a_sample_is_the_same_each_time_and_in_order(tmp_path):
    rows = [{**MEETINGS[0], "prompt": str(number)} for number in range(50)]
    source = write_lines(tmp_path / "rows.jsonl", rows)
    found = []
    for name in ("a", "b"):
        out = tmp_path / f"{name}.jsonl"
        assert main(["qmsum", "--source", str(source), "--out", str(out), "--sample", "9"]) == 0
        found.append([int(example["prompt"].split()[4]) for example in converted(out)])
    assert found[0] == found[1] == sorted(set(found[0])) and len(found[0]) == 9
    assert found[0][-1] > 20  # not the first ones
