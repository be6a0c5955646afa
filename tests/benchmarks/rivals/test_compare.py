"""The comparison with other libraries: what it prints where they are, are not, are slow or break off."""

import json
import re
import sys
import time

import pytest

from benchmarks.printed_rows import rows_in
from benchmarks.rivals import compare
from benchmarks.rivals.table import layer_table, model_table, times_ours, with_missing
from benchmarks.rivals.task import (
    FLA,
    JLA,
    LAYERS,
    MODELS,
    MODULES,
    NO_ROOM,
    OFFERS,
    OURS,
    RELEASE,
    Task,
    reason,
    with_fewer,
)
from rat_jax.program import FlagError, exit_code

TASK = Task(64, 8, 128, (32, 64), ("rat", "rnn"), ("rat_1b",), 3, True, None)
TIMES = {"train_ms": 6.0, "train_spread_ms": 0.5, "prefill_ms": 2.0, "prefill_spread_ms": 0.1, "train_gb": 1.5}


def row(rival, layer, tokens, **changes):
    return {"rival": rival, "version": "1.2", "layer": layer, "tokens": tokens, "rows": 4, "how": "x"} | TIMES | changes


def test_what_is_offered_exists():
    assert set(OFFERS) == set(MODELS) == set(MODULES)
    assert set(OFFERS[OURS]) == {layer for layers in OFFERS.values() for layer in layers} == set(LAYERS)
    assert TASK.offered(JLA).layers == TASK.offered(JLA).models == ()
    assert TASK.offered(FLA).layers == ("rnn",)


def test_lines_that_are_no_rows_or_are_cut_short_are_left_out():
    assert list(rows_in('warning\n{"a": 1}\n\n{"b": 2}\n{"c": ')) == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize("text", ["RESOURCE_EXHAUSTED: 8 GB", "CUDA out of memory. Tried"])
def test_a_batch_without_room_is_halved_until_there_is(text):
    tried = []

    def measure(count):
        tried.append(count)
        return {"rows": count, "error": reason(RuntimeError(text))} if count > 2 else {"rows": count}

    assert with_fewer(8, measure) == {"rows": 2}
    assert tried == [8, 4, 2]
    assert with_fewer(1, lambda count: {"error": NO_ROOM}) == {"error": NO_ROOM}
    assert reason(ValueError("two\nlines")) == "ValueError: two lines"


def test_every_row_that_did_not_come_says_why():
    found = [row(OURS, "rnn", 32), {"rival": OURS, "model": "rat_1b", "tokens": 64, "sequences": 2}]
    rows = with_missing(TASK, found, {OURS: "ended", FLA: "not installed", RELEASE: "no checkout"})
    said = [(row["rival"], row.get("layer", row.get("model")), row["tokens"], row.get("error")) for row in rows[:-1]]
    assert said == [
        (OURS, "rat", 32, "ended"),
        (RELEASE, "rat", 32, "no checkout"),
        (OURS, "rnn", 32, None),
        (FLA, "rnn", 32, "not installed"),
        (OURS, "rat", 64, "ended"),
        (RELEASE, "rat", 64, "no checkout"),
        (OURS, "rnn", 64, "ended"),
        (FLA, "rnn", 64, "not installed"),
    ]
    assert rows[-1] == found[1]


def test_a_row_that_lacks_train_says_why():
    whole = row(OURS, "rnn", 32)
    part = {name: value for name, value in row(FLA, "rnn", 32).items() if not name.startswith("train")}
    failed = part | {"error": "ValueError: no"}
    task = TASK._replace(lengths=(32,), layers=("rnn",), models=())
    assert with_missing(task, [whole, part], {OURS: "a", FLA: "b"}) == [whole, part | {"error": "train b"}]
    assert with_missing(task, [whole, part, failed], {OURS: "a", FLA: "b"}) == [whole, failed]


def test_the_tables():
    rows = [
        row(OURS, "rnn", 32),
        row(FLA, "rnn", 32, train_ms=9.0, rows=2),
        {"rival": FLA, "layer": "rnn", "tokens": 64, "error": NO_ROOM},
        {"rival": FLA, "layer": "rat", "tokens": 64, "rows": 4, "how": "x", "error": "no backward pass"}
        | {"prefill_ms": 2.0, "prefill_spread_ms": 0.1},
    ]
    assert times_ours(rows[1], rows[0], "train") == "3.00"  # in half of the rows
    assert times_ours(rows[1], rows[2], "train") == times_ours(rows[0], rows[0], "train") == ""
    _, ours, rival, missing, half = layer_table(rows).splitlines()
    assert ours.split()[:6] == ["32", "rnn", "ours", "1.2", "4", "6.00"]
    assert rival.split()[4:11] == ["2", "9.00", "0.50", "3.00", "2.00", "0.10", "2.00"]
    assert missing.split(maxsplit=3) == ["64", "rnn", "fla", NO_ROOM]
    assert half.split(maxsplit=7) == ["64", "rat", "fla", "4", "-", "2.00", "0.10", "x; no backward pass"]
    model = {"rival": JLA, "version": "0.1.0", "model": "transformer-1p3b", "tokens": 4096, "sequences": 8, "how": "x"}
    model |= {"step_ms": 500.0, "tokens_per_s": 65_536.0, "parameters": 1_300_000_000}
    _, line, missing = model_table([model, {"rival": OURS, "model": "rat_1b", "error": "ended"}]).splitlines()
    assert line.split()[3:] == ["4096", "8", "1300.0", "500.0", "65536", "x"]
    assert missing.split() == ["rat_1b", "ours", "ended"]


def modules(monkeypatch, folder, **sources):
    """Lets processes of these rivals run other modules."""
    for rival, source in sources.items():
        (folder / f"{rival}_module.py").write_text(source)
        monkeypatch.setitem(compare.MODULES, rival, f"{rival}_module")
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_a_process_that_breaks_off_or_is_slow_keeps_its_rows(monkeypatch, tmp_path, capfd):
    line = json.dumps(row(FLA, "rnn", 32))
    slow = f"import subprocess, sys, time\nprint({line!r}, flush=True)\n"
    slow += "print('@ rnn, T 32: train', 'a warning', sep='\\n', file=sys.stderr, flush=True)\n"
    slow += "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True)\n"
    slow += "time.sleep(60)"
    modules(monkeypatch, tmp_path, fla=f"print({line!r}, flush=True)\nimport no_such_package", jla=slow)
    rows, why = compare.run(FLA, TASK, 60)
    assert rows == [row(FLA, "rnn", 32)]
    assert why == "its process ended with exit code 1: ModuleNotFoundError: No module named 'no_such_package'"
    start = time.monotonic()
    capfd.readouterr()
    rows, why = compare.run(JLA, TASK, 2)
    assert rows == [row(FLA, "rnn", 32)]
    assert re.fullmatch("not measured within 2 s: since [0-2] s at rnn, T 32: train", why)
    assert time.monotonic() - start < 15
    heard = capfd.readouterr().err.splitlines()
    for text in ("@ rnn, T 32: train", "a warning", line):
        assert any(re.fullmatch(rf"jla [0-2]\.\d s: {re.escape(text)}", said) for said in heard)
    assert compare.run(RELEASE, TASK, 1) == ([], "--release names no checkout of it")


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    return exit_code(compare.main)


def test_ours_beside_a_library_that_is_not_installed(monkeypatch, tmp_path, capfd):
    (tmp_path / "fla.py").write_text("raise ModuleNotFoundError(\"No module named 'fla'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # before one that is installed
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    out = tmp_path / "rows.json"
    small = ("--small", "--layers", "rnn", "--models", "--out", str(out))
    assert call(monkeypatch, *small, "--rivals", "fla") == 1
    rows = json.loads(out.read_text())["rows"]
    ours, missing = rows
    assert (ours["rival"], ours["tokens"], ours["rows"], "error" in ours) == (OURS, 64, 2, False)
    assert ours["train_ms"] > 0 and ours["prefill_ms"] > 0
    assert (missing["rival"], missing["tokens"]) == (FLA, 64)
    assert "No module named 'fla'" in missing["error"]
    printed = capfd.readouterr().out
    assert printed.startswith("cpu, ") and "No module named 'fla'" in printed
    assert "rat_jax.mixers: rnn" in printed


def test_the_last_get_no_time_that_the_first_have_used(monkeypatch, tmp_path, capsys):
    slow = "import time\ntime.sleep(60)"
    modules(monkeypatch, tmp_path, ours=slow, fla=slow)
    times = ("--timeout_s", "60", "--within_s", "1")
    assert call(monkeypatch, "--small", "--layers", "rnn", "--models", "--rivals", "fla", *times) == 1
    ours, rival = capsys.readouterr().out.splitlines()[-2:]
    assert "ours" in ours and "not measured within 1 s" in ours
    assert "fla" in rival and "not measured within 0 s" in rival


CARD = "a card, a day"
# Stands for the process of ours: it describes the device, and has a row of each layer that it is asked for.
DESCRIBES = f"""import json, sys
print(json.dumps({{"card": {CARD!r}}}))
for layer in json.loads(sys.argv[1])["layers"]:
    print(json.dumps({row(OURS, "", 64, how="anew")!r} | {{"layer": layer}}))
"""


@pytest.fixture
def earlier_file(monkeypatch, tmp_path):
    """Writes rows as --out does, with the processes of ours and of a rival replaced."""
    modules(monkeypatch, tmp_path, ours=DESCRIBES, fla=f"print({json.dumps(row(FLA, 'rnn', 64))!r})")

    def write(rows, card=CARD, **sizes):
        task = compare.task_of(compare.parse(["--small"]))._replace(**sizes)
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps({"card": card, "task": task._asdict(), "rows": rows}))
        return str(path)

    return write


def test_ours_of_an_earlier_file_are_not_timed_again(monkeypatch, tmp_path, capsys, earlier_file):
    before = row(OURS, "rnn", 64, how="before", train_ms=3.0)
    files = earlier_file([before, row(FLA, "rnn", 64, how="before")]), earlier_file([row(OURS, "attention", 64)])
    out = tmp_path / "out.json"
    flags = ("--small", "--models", "--rivals", "fla", "--out", str(out), "--ours", *files)
    assert call(monkeypatch, *flags, "--layers", "rnn") == 0
    assert json.loads(out.read_text())["rows"] == [before, row(FLA, "rnn", 64)]
    printed = capsys.readouterr()
    assert printed.out.startswith(CARD) and " 2.00 " in printed.out and "anew" not in printed.err
    # A file has one of these layers with an error, and none has the other: both are timed, after the rival.
    files = earlier_file([before, row(OURS, "attention", 64) | {"error": NO_ROOM}]), *files[:1]
    flags = *flags[:-2], *files
    assert call(monkeypatch, *flags, "--layers", "rnn", "attention", "local_attention") == 1
    found = {(row["rival"], row["layer"]): row for row in json.loads(out.read_text())["rows"]}
    assert [found[OURS, name]["how"] for name in ("rnn", "attention", "local_attention")] == ["before", "anew", "anew"]
    said = capsys.readouterr().err
    assert said.index("fla: ") < said.index("anew")
    assert "exit code 0" in found[FLA, "attention"]["error"]


def test_ours_of_another_device_or_of_other_sizes_are_refused(monkeypatch, capsys, tmp_path, earlier_file):
    rows = [row(OURS, "rnn", 64)]
    (tmp_path / "no_rows.json").write_text('{"card": "x"}')
    for file, message in [
        (earlier_file(rows, card="a card, yesterday"), "measured on 'a card, yesterday'; this is 'a card, a day'"),
        (earlier_file(rows, width=128), "width 128, not 64"),
        (earlier_file(rows, lengths=(32,)), "keys_seen 8, not 16"),
        (earlier_file(rows, repeats=50), "repeats 50, not 3"),
        (earlier_file(rows, lengths=()), "no file that --out has written"),
        (str(tmp_path / "no_rows.json"), "no file that --out has written"),
        (str(tmp_path / "absent.json"), "absent.json, which does not exist"),
    ]:
        assert call(monkeypatch, "--small", "--layers", "rnn", "--models", "--rivals", "fla", "--ours", file) == 2
        printed = capsys.readouterr()
        assert message in printed.err and "fla 0" not in printed.err and not printed.out
    modules(monkeypatch, tmp_path, ours="raise SystemExit('no jax')")
    assert call(monkeypatch, "--small", "--layers", "rnn", "--models", "--ours", earlier_file(rows)) == 2
    assert "description of this device" in (said := capsys.readouterr().err) and "no jax" in said


def test_rows_are_in_the_file_before_the_last_process_ends(monkeypatch, tmp_path):
    out = tmp_path / "out.json"
    seen = f"print(open({str(out)!r}).read().replace(chr(10), ''), file=__import__('sys').stderr)\nraise SystemExit(3)"
    modules(monkeypatch, tmp_path, ours=f"print({json.dumps(row(OURS, 'rnn', 64))!r})", fla=seen)
    flags = ("--small", "--layers", "rnn", "--models", "--rivals", "fla", "--out", str(out))
    assert call(monkeypatch, *flags) == 1
    ours, rival = json.loads(out.read_text())["rows"]
    assert ours == row(OURS, "rnn", 64)
    assert '"no description of the device"' in rival["error"]  # of the file as the second process has seen it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--heads", "12"), "--heads"),
        (("--lengths", "100"), "--lengths"),
        (("--lengths", "4096", "--tokens", "1024"), "--tokens"),
        (("--repeats", "2"), "--repeats"),
        (("--rivals", "mamba"), "--rivals"),
    ],
)
def test_flags_that_do_not_fit(arguments, message):
    with pytest.raises(FlagError, match=message):
        compare.task_of(compare.parse(arguments))
