"""Decode throughput of a small config: the tables, their files, and what they are made from."""

import argparse
import contextlib
import io
import json

import jax
import numpy as np
import pytest

from benchmarks import card, decode_steps, decode_throughput, model_throughput, traffic
from rat_jax.config import config_from_dict
from rat_jax.config_file import load_config_file
from rat_jax.report.costs import cache_bytes

GB_PER_S = 100.0
JOB = traffic.Job(5, (1, 16), (1, 12))
CONFIG = """
from configs import default


def get_config():
    config = default.get_config()
    config.model.vocab_size = 31
    config.model.width = 16
    config.model.num_layers = 1
    config.model.pattern = ("rat",)
    config.model.mlp_width = 32
    return config
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("configs") / "small.py"
    file.write_text(CONFIG)
    return file


@pytest.fixture(scope="module")
def model_config(config_file):
    return config_from_dict(load_config_file(str(config_file), "--configs")).model


@pytest.fixture(scope="module")
def decoder(model_config):
    return decode_steps.random_decoder(model_config)


@pytest.fixture(scope="module")
def measured(config_file, tmp_path_factory):
    """What the program printed, and its files."""
    out, printed = tmp_path_factory.mktemp("out") / "decode.png", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(card, "measure_ceilings", lambda repeats: card.Ceilings(GB_PER_S, 1.0))
        patch.setattr(card, "share_memory", lambda: None)  # settings of the whole process
        patch.setattr(decode_throughput, "use_cache", lambda choice: None)
        patch.setattr(traffic, "JOBS", {"mixed": JOB})
        words = (
            f"--config {config_file} --batch_sizes 1 4 --positions 64 --steps 32 --traffic mixed --slots 3 --out {out}"
        )
        assert decode_throughput.main(words.split()) == 0
    return printed.getvalue(), json.loads(out.with_suffix(".json").read_text()), out.read_bytes()


def test_steps(measured, model_config):
    printed, table, _ = measured
    assert decode_steps.TITLES in printed
    assert [(row["config"], row["position"], row["num_rows"]) for row in table["steps"]] == [
        ("small", 64, 1),
        ("small", 64, 4),
    ]
    one, four = table["steps"]
    for row in (one, four):
        assert f"{row['tokens_per_s']:.0f}" in printed
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["num_rows"] / row["ms"])
        assert row["bound_ms"] == pytest.approx(1e3 * row["read_gb"] / GB_PER_S)
        assert row["reached"] == pytest.approx(row["bound_ms"] / row["ms"])
        assert row["held_gb"] > row["read_gb"] > 0
    assert one["cache_gb"] * 1e9 == cache_bytes(model_config, (64,))[0]
    assert four["cache_gb"] == pytest.approx(4 * one["cache_gb"])
    rows_read = (four["read_gb"] - one["read_gb"]) / 3  # of one row; the rest is weights
    assert 0 < rows_read <= one["cache_gb"] < one["read_gb"] - rows_read


def test_traffic(measured, model_config):
    printed, table, _ = measured
    assert traffic.TITLES in printed
    (row,) = table["traffic"]
    requests = JOB.requests(model_config.vocab_size)
    assert (row["config"], row["job"], row["num_prompts"], row["num_slots"]) == ("small", "mixed", 5, 3)
    assert row["prompt_tokens"] == sum(len(request.prompt) for request in requests)
    assert row["new_tokens"] == sum(request.max_new_tokens for request in requests)
    assert row["padding"] >= 1
    assert 0 < row["compile_s"] < row["cold_s"]
    assert row["new_per_s"] == pytest.approx(row["new_tokens"] / row["warm_s"])
    assert row["all_per_s"] - row["new_per_s"] == pytest.approx(row["prompt_tokens"] / row["warm_s"])
    assert row["decode_per_s"] == pytest.approx(row["new_tokens"] / (row["warm_s"] - row["prefill_s"]))
    for name in ("new", "all", "decode"):
        assert row[f"{name}_share"] == pytest.approx(row[f"{name}_per_s"] / row["steps_per_s"])
    assert row["peak_gb"] is None  # a CPU does not tell
    caches = 3 * cache_bytes(model_config, (row["capacity"],))[0] / 1e9
    assert row["planned_gb"] > caches + table["steps"][0]["read_gb"] / 2


def test_an_engine_leaves_its_memory_to_the_next(decoder, measured):
    def held():
        return sum(x.nbytes for x in jax.live_arrays())

    requests = JOB.requests(decoder.config.vocab_size)
    before = held()
    traffic._serve(decoder, requests, 3, traffic.capacity_of(requests), None)
    assert held() - before < decoder.cache_bytes(3, traffic.capacity_of(requests))


def test_picture_and_card(measured):
    printed, table, picture = measured
    assert picture.startswith(b"\x89PNG")
    assert table["card"] in printed and table["copy_gb_per_s"] == GB_PER_S


def test_model_throughput_prints_the_same_columns(config_file, measured, capsys):
    flags = argparse.Namespace(
        config=str(config_file), batch_sizes=[4], decode_first=48, decode_last=64, decode_steps=16
    )
    model_throughput.decode_table(flags, GB_PER_S)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == decode_steps.TITLES
    assert len(lines[-1].split()) == 7 and lines[-1].split()[0] == "4"


def test_profile(decoder, tmp_path):
    compiled = decode_steps.lower(decoder, 4, 64).compile()
    report = decode_steps.profile(decoder, compiled, 4, 64, 48, str(tmp_path))
    assert "ms of device work" in report and "element-wise, mixer" in report
    assert list(tmp_path.glob("**/*.xplane.pb"))


def test_steps_are_spread_over_the_positions(decoder):
    starts = []

    class Compiled:
        def __call__(self, arrays, tokens, cache, start):
            starts.append(int(start))
            return tokens, cache

        def memory_analysis(self):
            return argparse.Namespace(
                temp_size_in_bytes=1, output_size_in_bytes=2, argument_size_in_bytes=4, alias_size_in_bytes=2
            )

    row = decode_steps.measure(decoder, Compiled(), 2, 200, first=100, last=196, steps=79)
    assert starts == [110, 110, 130, 150, 170, 170]  # the first and the last are not counted
    assert row.held_gb == 5e-9


def test_rows_that_fit(decoder, monkeypatch):
    row_bytes = decoder.cache_bytes(1, 64)

    def sizes(free):
        monkeypatch.setattr(decode_steps, "free_for_rows", lambda: free)
        return decode_throughput._batch_sizes(decoder, 64)

    most = sizes(600 * row_bytes)[-1]
    assert most % 16 == 0 and 256 < most < 600
    assert sizes(600 * row_bytes) == [1, 16, 256, most]
    assert sizes(5 * row_bytes)[-1] in (3, 4)
    assert sizes(row_bytes) == []
    requests = JOB.requests(31)
    assert traffic.num_slots(decoder, requests, 4) == 1  # one is tried
    monkeypatch.undo()  # a CPU, whose memory is not its own
    assert traffic.num_slots(decoder, requests, 4) == 4
    with pytest.raises(decode_throughput.program.FlagError, match="--batch_sizes"):
        decode_throughput._batch_sizes(decoder, 64)


def test_rows_that_do_not_fit_leave_the_others(monkeypatch, capsys):
    def measure(decoder, compiled, num_rows, *rest):
        if num_rows == 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return decode_steps.DecodeRow(num_rows, 2.0, 0.5, 1.0, 3.0)

    monkeypatch.setattr(decode_steps, "measure", measure)
    monkeypatch.setattr(decode_steps, "lower", lambda *arguments: argparse.Namespace(compile=lambda: None))
    flags = decode_throughput.parse(["--configs", "x.py", "--batch_sizes", "4", "8", "--positions", "1024"])
    failed, done = decode_throughput.measure_steps("x", None, {1024: [4, 8]}, flags, GB_PER_S)
    assert failed["error"] == "does not fit the memory of this device"
    assert (done["num_rows"], done["tokens_per_s"], done["reached"]) == (8, 4000, 5)
    assert failed["error"] in capsys.readouterr().out
    decode_throughput.draw([failed, done], [], GB_PER_S, "a card")


def test_a_job_is_the_same_at_each_call_and_its_beginning_that_of_a_longer_one():
    requests, longer = JOB.requests(31), traffic.Job(9, JOB.prompt_tokens, JOB.new_tokens).requests(31)
    assert len(longer) == 9
    for one, other in zip(requests, longer[:5], strict=True):
        np.testing.assert_array_equal(one.prompt, other.prompt)
        assert one.max_new_tokens == other.max_new_tokens
    lengths = {len(request.prompt) for request in traffic.Job(400, (2, 4), (7, 7)).requests(31)}
    assert lengths == {2, 3, 4}


def test_mean_position_and_capacity():
    requests = JOB.requests(31)
    positions = [len(one.prompt) + i for one in requests for i in range(one.max_new_tokens - 1)]
    assert traffic.mean_position(requests) == pytest.approx(np.mean(positions))
    assert traffic.capacity_of(requests) > max(positions)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--positions 32", "--positions must be 64 or more, got 32"),
        ("--batch_sizes 0", "--batch_sizes must be 1 or more, got 0"),
        ("--steps 8", "--steps must be 16 or more"),
        ("--traffic busy", "invalid choice: 'busy'"),
        ("--out table.json", ".png"),
    ],
)
def test_flags_that_are_refused(words, problem, capsys):
    assert decode_throughput.main(["--configs", "configs/default.py", *words.split()]) == 2
    assert problem in capsys.readouterr().err
