"""Names of results: the same measurement has the same one, any other has another."""

import pathlib

import pytest

from rat_jax.evaluation.results import results_path

FOLDER = pathlib.Path("run")


def results(lengths=(256, 512), fractions=(1.0, 1.0), step=7, data_path="/data/mine", data_hash="a"):
    evaluations = [
        {"context_length": length, "split_fraction": fraction}
        for length, fraction in zip(lengths, fractions, strict=True)
    ]
    return {"step": step, "data_path": data_path, "data_hash": data_hash, "evaluations": evaluations}


def test_the_name_says_what_was_measured():
    path = results_path(FOLDER, results())
    assert path.name.startswith("evaluation-7-mine-256_512-")
    assert results_path(FOLDER, results()) == path


@pytest.mark.parametrize(
    "change",
    [
        {"step": 8},
        {"data_hash": "b"},
        {"data_path": "/data/other"},
        {"fractions": (1.0, 0.5)},
        {"lengths": (256, 1024)},
    ],
)
def test_other_measurements_have_other_names(change):
    assert results_path(FOLDER, results(**change)) != results_path(FOLDER, results())


def test_names_are_short_and_plain():
    many = range(1, 2000)
    path = results_path(FOLDER, results(many, [1.0] * len(many), data_path="/data/" + "é /x" * 60 + "\n" * 50))
    assert path.name.isascii() and path.name.isprintable() and " " not in path.name
    assert "-1_to_1999-" in path.name
    assert len(path.name) < 120
