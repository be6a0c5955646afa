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
    for index, prompt in enumerate(PROMPTS):
        assert f"--- {index + 1} of 4 ---\n{prompt}{expected[prompt]}\n" in printed.out

    output_file.write_bytes(whole[: whole.index(b"\n") + 20])  # a kill in the second line
    assert call_script("generate.py", *command) == 0
    assert output_file.read_bytes() == whole
    assert capsys.readouterr().err.startswith(f"{output_file}: 1 of 4 completions are there\ntimes: ")
    assert call_script("generate.py", *command, "--prompt=more") == 2
    assert "is no completion of --prompt number 3" in capsys.readouterr().err
    assert call_script("generate.py", *command) == 0
    assert "4 of 4 completions are there" in capsys.readouterr().err
    assert output_file.read_bytes() == whole


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
        ([f"--prompts_file={tmp_path / 'p.jsonl'}"], f"{tmp_path / 'p.jsonl'}, line 1: is not JSON"),
        (["--prompt=a", "--batch_size=0"], "flag --batch_size=0"),
        (["--prompt=a", "word"], "'word' is no flag; put a value with spaces in quotes"),
    ):
        assert call_script("generate.py", "--workdir", workdir, *arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith(f"error: {message}")
        assert printed.err.count("\n") == 1
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
