"""What results are said to show: errors of seeds and of text, verdicts, tables and pictures."""

import math

import numpy as np
import pytest

from benchmarks.evidence import pictures, report, tables
from benchmarks.evidence.comparison import read_results
from benchmarks.evidence.studies import KINDS
from rat_jax.errors import RatJaxError
from tests.benchmarks.evidence.example_results import TARGETS, result, write


@pytest.fixture
def folder(tmp_path):
    """Attention, and kinds that are better, alike, and worse than it by its seeds' error; the last one fails."""
    return write(
        tmp_path,
        *(result("attention", seed, loss) for seed, loss in enumerate((3.00, 3.02))),
        *(result("rat_swa", seed, loss) for seed, loss in enumerate((2.90, 2.92))),
        *(result("rat", seed, loss) for seed, loss in enumerate((3.02, 3.02))),
        *(result("rnn", seed, loss) for seed, loss in enumerate((3.30, 3.34))),
        result("rat_swa_nope", 0, 2.95, growth=-0.01),
        result("attention_nope", 0, 3.05, growth=0.3),
        {"kind": "rat_4", "seed": 0, "failed": "out of memory"},
        speeds={"rat_swa": 1000.3},
    )


def test_error_of_seeds(folder):
    """s^2 = (2 x 0.01^2 + 2 x 0.01^2 + 0 + 2 x 0.02^2) / 4, of four kinds with two seeds."""
    results = read_results(folder)
    deviation = math.sqrt((2e-4 + 2e-4 + 0 + 8e-4) / 4)
    assert results.seed_deviation == pytest.approx(deviation)
    assert results.error("attention") == pytest.approx(deviation / math.sqrt(2))
    assert results.error("attention", "rat_swa_nope") == pytest.approx(deviation * math.sqrt(1.5))


def test_verdicts(folder):
    results = read_results(folder)
    verdicts = {kind: results.verdict(kind, "attention") for kind in ("rat_swa", "rat", "rnn")}
    assert verdicts == {"rat_swa": "lower", "rat": "tie", "rnn": "higher"}


def test_one_seed_has_no_error(tmp_path):
    results = read_results(write(tmp_path, result("rat", 0, 3.0), result("rnn", 0, 3.1)))
    assert results.seed_deviation is results.error("rat") is results.verdict("rat", "rnn") is None
    assert "| rat | 33.50 M | 1 | 3.0000 |  |" in tables.loss_table(results, ["rat"])


def test_interval_of_the_text(folder):
    """Of a loss it is that of its documents, drawn anew; of a difference that is the same in all, nearly nothing."""
    results = read_results(folder)
    low, high = results.interval("attention", 16)
    generator, means = np.random.default_rng(1), []
    for _ in range(4000):
        drawn = generator.integers(4, size=4)
        weights = np.array(TARGETS)[drawn]
        means.append((weights * (3.01 + 0.1 * (drawn - 1.7))).sum() / weights.sum())
    assert (low, high) == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=0.02)
    assert results.difference_interval("rat_swa", "attention", 16) == pytest.approx((-0.1, -0.1))
    assert results.growth_interval("attention_nope", 64) == pytest.approx((0.9, 0.9))


def test_tables_and_claims(folder):
    results = read_results(folder)
    text = report.text(results)
    assert "| rat_swa | 33.50 M | 2 | 2.9100 | " in text
    assert "| lower | 1,000 |" in text and "| higher |  |" in text  # a kind that was not timed
    assert "| rat_swa_nope | the paper's | 2.60 | -0.01 | +0.06 |" in text
    assert "| rat_swa_nope | ours | 2.95 | -0.01 | -0.03 |" in text
    assert "| rat_4-0 | out of memory |" in text
    claims = dict(line.strip("| ").split(" | ", 1) for line in tables.claims_table(results).splitlines()[2:])
    answers = {claim: rest.split(" | ")[-1] for claim, rest in claims.items()}
    assert answers == {
        "RAT-SWA is no worse than attention": "yes",
        "attention is no worse than RAT (16)": "yes",
        "RAT (16) is better than the RNN": "yes",
        "attention_nope: flat to 4x": "no",
        "rat_swa_nope: flat to 4x": "yes",
    }


def test_pictures(folder):
    results = read_results(folder)
    for draw in (pictures.draw_losses, pictures.draw_sweeps, pictures.draw_lengths):
        figure = draw(results)
        assert all(axes.get_legend() or axes.lines or axes.containers for axes in figure.axes)
    labels = {text.get_text() for axes in pictures.draw_lengths(results).axes for text in axes.get_legend().get_texts()}
    assert labels == {"attention", "attention_nope", "rat", "rat_swa", "rat_swa_nope", "rnn"}
    assert set(results.by_kind) <= set(KINDS)


def test_what_does_not_compare_is_refused(folder, tmp_path):
    with pytest.raises(RatJaxError, match="has no results: python -m benchmarks"):
        read_results(tmp_path / "empty")
    write(folder, result("rat_8", 0, 3.0) | {"document_targets": [1, 2, 3, 4]})
    with pytest.raises(RatJaxError, match=r"attention-0\.json and .*rat_8-0\.json are of different validation splits"):
        read_results(folder)


@pytest.mark.parametrize(
    ("of", "change", "what"),
    [
        ("rnn", lambda values: values["config"]["data"].update(seq_len=32), "training lengths"),
        ("rnn", lambda values: values["config"]["training"].update(num_steps=80), "training steps"),
        ("rnn", lambda values: values.update(training_tokens=1), "training tokens"),
        ("rnn", lambda values: values["lengths"].pop("64"), "lengths of sequences"),
        ("rat", lambda values: values["lengths"]["64"]["loss_by_octave"].pop(), "octaves of positions"),
        ("rat", lambda values: values["validation_losses"].pop(), "steps of validations"),
    ],
)
def test_results_of_which_there_is_no_mean_are_named(tmp_path, of, change, what):
    other = result(of, 1, 3.1)
    change(other)
    with pytest.raises(RatJaxError, match=rf"rat-0\.json and .*{of}-1\.json are of different {what}, .* elsewhere"):
        read_results(write(tmp_path, result("rat", 0, 3.0), other))
