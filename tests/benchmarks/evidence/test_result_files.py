"""Files of results and speeds that are damaged, cut short, foreign or without a figure: named, with what to do."""

import copy
import json
import shutil

import pytest

from benchmarks.evidence import report
from benchmarks.evidence.comparison import read_results
from benchmarks.evidence.result_files import read_result, read_speed
from rat_jax.errors import RatJaxError
from tests.benchmarks.evidence.example_results import result, write

SPEED = {"kind": "rat", "tokens_per_second": 1000.0}
FAILURE = {"kind": "rat", "seed": 0, "failed": "out of memory"}
READERS = {"results": ("rat-0.json", read_result), "speeds": ("rat.json", read_speed)}
DAMAGES = {
    "empty": b"",
    "cut short": json.dumps(result("rat", 0, 3.0)).encode()[:-40],
    "no text": b"\xff\xfe{}",
    "a list": b"[1]",
    "nothing": b"null",
    "another's file": b'{"step": 3, "evaluations": []}',
    "nested": b'{"kind":' + b"[" * 100_000,
}


def paths(values, above=()):
    """Of every key in objects in objects."""
    for key, value in values.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from paths(value, (*above, key))


def read_changed(tmp_path, folder, values):
    name, read = READERS[folder]
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / name).write_text(json.dumps(values))
    return read(tmp_path / folder / name)


def changes(path):
    """Ways to damage what is there; `failed` tells a model that failed, and a short split has no long sequences."""
    if path not in (("failed",), *(("lengths", str(tokens)) for tokens in (32, 64, 128))):
        yield lambda at, key: at.pop(key)
    for value in (None, True, {"x": 1}, [[None]], float("nan"), 10**400):
        yield lambda at, key, value=value: at.update({key: value})


@pytest.mark.parametrize(
    ("folder", "values"), [("results", result("rat", 0, 3.0)), ("results", FAILURE), ("speeds", SPEED)]
)
def test_no_figure_is_left_out_or_of_another_type(tmp_path, folder, values):
    """Of all that these files hold, which is what tables and pictures are made of."""
    read_changed(tmp_path, folder, values)
    for path in paths(values):
        for change in changes(path):
            damaged = at = copy.deepcopy(values)
            for key in path[:-1]:
                at = at[key]
            change(at, path[-1])
            with pytest.raises(RatJaxError, match=r"\.json.* is damaged: .*; delete it and give its command again"):
                read_changed(tmp_path, folder, damaged)
                pytest.fail(f"{path}: {at} was read")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("parameters", 0, "parameters is 0"),
        ("seconds", -1.0, "seconds is -1.0"),
        ("validation_losses", [[1, 2.0, 3]], "validation_losses are not two a row"),
        ("document_targets", [10, -30, 20, 40], "document_targets are no counts"),
        ("document_targets", [0, 0, 0, 0], "document_targets are none"),
        ("document_targets", [100], "document_losses are 4, document_targets 1"),
        ("lengths", {}, "lengths have no 16, which is that of the training"),
        ("lengths", {"sixteen": result("rat", 0, 3.0)["lengths"]["16"]}, "'sixteen' is no length of sequences"),
    ],
)
def test_figures_that_none_can_be_are_refused(tmp_path, name, value, message):
    with pytest.raises(RatJaxError, match=f"is damaged: {message}; delete it"):
        read_changed(tmp_path, "results", result("rat", 0, 3.0) | {name: value})


@pytest.mark.parametrize("folder", READERS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_report_names_a_damaged_file_and_what_to_do(tmp_path, capsys, folder, damage):
    write(tmp_path, result("attention", 0, 3.0), result("rat", 0, 3.0), speeds={"rat": 1.0})
    name, _ = READERS[folder]
    (tmp_path / folder / name).write_bytes(DAMAGES[damage])
    assert report.main([str(tmp_path)]) == 2
    said = capsys.readouterr()
    program = {"results": "run_studies", "speeds": "run_speeds"}[folder]
    assert said.err.startswith(f"error: {tmp_path / folder / name} is damaged: ") and said.err.count("\n") == 1
    assert (
        f"delete it and give its command again, python -m benchmarks.evidence.{program} --out {tmp_path} " in said.err
    )
    assert said.out == ""


def test_a_copy_counts_once(tmp_path):
    """It would be a second seed without any difference."""
    write(tmp_path, result("rat", 0, 3.0), speeds={"rat": 1.0})
    shutil.copy(tmp_path / "results" / "rat-0.json", tmp_path / "results" / "rat-1.json")
    with pytest.raises(RatJaxError, match=r"rat-1\.json is damaged: what it holds belongs into rat-0\.json"):
        read_results(tmp_path)
    (tmp_path / "results" / "rat-1.json").unlink()
    shutil.copy(tmp_path / "speeds" / "rat.json", tmp_path / "speeds" / "rnn.json")
    with pytest.raises(RatJaxError, match=r"rnn\.json is damaged: what it holds belongs into rat\.json"):
        read_results(tmp_path)


def test_a_kind_that_no_study_has_is_refused(tmp_path):
    with pytest.raises(RatJaxError, match=r"lstm-0\.json is damaged: kind is 'lstm', which no study has"):
        read_results(write(tmp_path, result("lstm", 0, 3.0)))
