"""The digest of a folder of task files: it changes with what they and their data say, with nothing else."""

import json

from rat_jax.evaluation.harness_tasks import Tasks


def make_folder(folder, data_files):
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    (folder / "functions.py").write_text("def text(doc):\n    return doc['text']\n")
    values = {"task": "one", "dataset_path": "json", "dataset_kwargs": {"data_files": data_files}}
    (folder / "one.yaml").write_text(json.dumps(values))  # JSON is YAML
    return folder


def found(folder):
    return Tasks(["one"], folder).files_hash()


def test_it_follows_the_files_wherever_they_lie(tmp_path):
    first, second = (make_folder(tmp_path / name, "rows.jsonl") for name in "ab")
    assert found(first) == found(second)
    assert Tasks(["piqa"]).files_hash() is None
    before = found(second)
    for name, change in (("one.yaml", " "), ("functions.py", "\n"), ("more.yaml", "{task: more}")):
        with (second / name).open("a") as file:
            file.write(change)
        after = found(second)
        assert after != before
        before = after
    (second / "notes.txt").write_text("of no task")
    assert found(second) == before


def test_it_follows_local_data(tmp_path):
    for name, data_files in (("a", str), ("b", lambda path: [path]), ("c", lambda path: {"test": [path]})):
        rows = tmp_path / name / "rows.jsonl"
        folder = make_folder(tmp_path / name, data_files(str(rows)))
        before = found(folder)
        with rows.open("a") as file:
            file.write("\n")
        assert found(folder) != before
