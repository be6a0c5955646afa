"""generate.py as a user runs it."""

import json
import re

import pytest
from flax import nnx

import rat_jax.checkpoints
from rat_jax.checkpoints.model_workdir import save_model
from rat_jax.checkpoints.store import load_model
from rat_jax.data.tokenizer import ByteTokenizer
from rat_jax.model import LanguageModel
from rat_jax.sampling import generate
from rat_jax.sampling.output_file import OutputFile
from tests.commands import call_script, run_script
from tests.tiny_run import tiny_config

SETTINGS = ["--max_new_tokens=20", "--temperature=1.5", "--top_k=100", "--seed=3"]
PROMPTS = ["naïve €", "first", "", "third\nline"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate_script") / "run"
    config = tiny_config("nowhere", model__vocab_size=257, model__pattern=("rnn",))
    save_model(folder, config, LanguageModel(config.model, rngs=nnx.Rngs(0)), step=7, tokenizer=ByteTokenizer())
    return folder


@pytest.fixture(scope="module")
def expected(workdir):
    """The continuation of each prompt."""
    tokenizer = ByteTokenizer()
    ids = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in PROMPTS]
    settings = {"temperature": 1.5, "top_k": 100, "seed": 3, "eos_id": tokenizer.eos_id}
    rows = generate(load_model(workdir).model, ids, max_new_tokens=20, **settings)
    return {prompt: tokenizer.decode(row) for prompt, row in zip(PROMPTS, rows, strict=True)}


def test_one_prompt_prints_its_text(workdir, expected):
    done = run_script("generate.py", "--workdir", workdir, "--prompt", PROMPTS[0], *SETTINGS)
    assert done.returncode == 0
    assert re.fullmatch(r"times: imports .*, load .*, first token .* tokens in .*\n", done.stderr)
    assert done.stdout == f"{PROMPTS[0]}{expected[PROMPTS[0]]}\n"


def test_many_prompts_from_flags_and_file_in_batches(workdir, expected, tmp_path, capsys):
    prompts_file, output_file = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    records = [{"id": number, "prompt": prompt} for number, prompt in enumerate(PROMPTS[2:])]
    prompts_file.write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = [f"--prompts_file={prompts_file}", f"--output_file={output_file}", "--batch_size=2"]
    command = ["--workdir", workdir, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], *flags, *SETTINGS]
    assert call_script("generate.py", *command) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("times: ") and printed.err.count("\n") == 1
    whole = output_file.read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [(line["prompt"], line["completion"]) for line in lines] == [(text, expected[text]) for text in PROMPTS]
    assert [line.get("id") for line in lines] == [None, None, 0, 1]
    assert printed.out == ""

    output_file.write_bytes(whole[: whole.index(b"\n") + 20])  # a kill in the second line
    assert call_script("generate.py", *command) == 0
    assert output_file.read_bytes() == whole
    assert capsys.readouterr().err.startswith(f"{output_file}: 1 of 4 completions are there\ntimes: ")
    assert call_script("generate.py", *command, "--prompt=more") == 2
    assert "is no completion of --prompt number 3" in capsys.readouterr().err
    assert call_script("generate.py", *command) == 0
    assert "4 of 4 completions are there" in capsys.readouterr().err
    for other in ("--max_new_tokens=7", "--repetition_penalty=1.5", "--stop=x"):  # though nothing is left to make
        assert call_script("generate.py", *command, other) == 2
        assert "texts.jsonl, line 1, was made with other settings: " in capsys.readouterr().err
    assert output_file.read_bytes() == whole


def test_many_prompts_are_printed(workdir, expected, capsys):
    assert call_script("generate.py", "--workdir", workdir, *(f"--prompt={text}" for text in PROMPTS), *SETTINGS) == 0
    printed = capsys.readouterr().out
    for index, prompt in enumerate(PROMPTS):
        assert f"--- {index + 1} of 4 ---\n{prompt}{expected[prompt]}\n" in printed


def test_bad_and_long_lines_are_named_skipped_and_counted(workdir, expected, tmp_path, capsys):
    """Also where the rest is there already; as texts come, and with all that can be asked for."""
    prompts_file, output_file = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    lines = ["{", *(json.dumps({"prompt": text}) for text in PROMPTS[:2]), json.dumps({"prompt": 9 * "long"})]
    prompts_file.write_text("\n".join(lines))
    wishes = ["--order=arrival", "--num_samples=2", "--log_probs", "--min_new_tokens=2", "--max_prompt_tokens=20"]
    stop = expected[PROMPTS[1]][4:6]
    files = [f"--prompts_file={prompts_file}", f"--output_file={output_file}"]
    command = ["--workdir", workdir, *files, *wishes, f"--stop={stop}", *SETTINGS]
    for _ in range(2):
        assert call_script("generate.py", *command) == 0
        errors = capsys.readouterr().err.splitlines()
        assert errors[0].startswith(f"skipped: {prompts_file}, line 1: is not JSON")
        refused = f"skipped: {prompts_file}, line 4: has 36 tokens, more than max_prompt_tokens 20: shorten it"
        assert sum(line.startswith(refused) for line in errors) == 1
        assert errors[-1] == "2 of 4 prompts were skipped"
        records = [json.loads(line) for line in output_file.read_bytes().splitlines()]
        assert sorted((r["prompt_number"], r["sample"]) for r in records) == [(2, 0), (2, 1), (3, 0), (3, 1)]
    assert "4 of 6 completions are there" in errors[1]
    for record in records:
        assert len(record["tokens"]) == len(record["log_probs"]) >= 2
        if record["sample"] == 0:
            whole = expected[record["prompt"]]
            assert record["completion"] == whole.split(stop)[0]


def test_ctrl_c_keeps_what_is_done(workdir, expected, tmp_path, capsys, monkeypatch):
    output_file, real = tmp_path / "texts.jsonl", OutputFile.write

    def interrupt_second(file, *arguments):
        if file.num_done == 1:
            raise KeyboardInterrupt
        real(file, *arguments)

    monkeypatch.setattr(OutputFile, "write", interrupt_second)
    flags = [f"--prompt={PROMPTS[1]}", f"--prompt={PROMPTS[3]}", f"--output_file={output_file}"]
    assert call_script("generate.py", "--workdir", workdir, *flags, "--order=arrival", *SETTINGS) == 75
    said = f"interrupted: 1 of 2 completions are in {output_file}; the same command goes on\n"
    assert capsys.readouterr().err.endswith(said)
    (line,) = map(json.loads, output_file.read_text().splitlines())
    assert line["completion"] == expected[line["prompt"]]


def test_errors_are_one_line_and_come_before_the_model_is_loaded(workdir, tmp_path, capsys, monkeypatch):
    done = run_script(
        "generate.py", "--workdir", tmp_path / "missing", b"--prompt=a\xff".decode(errors="surrogateescape")
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(r"error: --prompt number 1: '\udcff' at position 1 is no character")
    assert done.stderr.count("\n") == 1

    monkeypatch.setattr(rat_jax.checkpoints, "load_model", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.jsonl").write_text("text\n")
    for arguments, message in (
        ([], "there is nothing to continue"),
        (["--prompt=a", "--output_file=~/no/x.jsonl"], f"{tmp_path / 'no' / 'x.jsonl'} cannot be "),
        (["--prompt=a", "--output_file=gs://bucket/x"], "--output_file is 'gs://bucket/x': gs:// is not read directly"),
        (
            ["--prompt=a", f"--output_file={tmp_path / 'p.jsonl'}"],
            f"output file {tmp_path / 'p.jsonl'}, line 1: is not",
        ),
        (["--prompt=a", "--log_probs"], "--log_probs needs an --output_file"),
        (["--prompt=a", "--num_samples=2"], "num_samples 2 has no effect at temperature 0"),
        (["--prompt=a", "--batch_size=0"], "flag --batch_size=0"),
        (["--prompt=a", "word"], "'word' is no flag; put a value with spaces in quotes"),
    ):
        assert call_script("generate.py", "--workdir", workdir, *arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith(f"error: {message}")
        assert printed.err.count("\n") == 1
    assert call_script("generate.py", "--workdir", workdir, f"--prompts_file={tmp_path / 'p.jsonl'}") == 2
    skipped, error = capsys.readouterr().err.splitlines()
    assert skipped.startswith(f"skipped: {tmp_path / 'p.jsonl'}, line 1: is not JSON")
    assert error == "error: there is nothing to continue: all 1 prompts were skipped"
    assert call_script("generate.py", "--prompt=a") == 2
    assert capsys.readouterr().err.startswith("error: --workdir is missing; ")


def test_settings_that_do_nothing_or_cannot_be_are_refused(workdir, capsys):
    for setting, message in (
        ("--top_p=0", "top_p must lie between 1e-06 and 1, got 0.0"),
        ("--top_p=0.9", "top_p 0.9 has no effect at temperature 0"),
        ("--max_new_tokens=2147483648", "a prompt of 1 tokens and max_new_tokens 2147483648 are more than 2**31 - 1"),
    ):
        assert call_script("generate.py", "--workdir", workdir, "--prompt=a", setting) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith(f"error: {message}")
        assert printed.err.count("\n") == 1


def test_a_seed_that_does_nothing_is_said(workdir, capsys, monkeypatch):
    monkeypatch.setattr(rat_jax.checkpoints, "load_model", None)
    assert call_script("generate.py", "--workdir", workdir, "--prompt=a", "--seed=1", "--top_k=2") == 2
    said, _ = capsys.readouterr().err.splitlines()
    assert said == "seed 1 has no effect at temperature 0, which draws nothing"
