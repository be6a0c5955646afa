"""generate.py as a user runs it."""

import json

import pytest
from flax import nnx

from rat_jax.checkpoints.store import load_model, save_model
from rat_jax.data.tokenizer import ByteTokenizer
from rat_jax.model import LanguageModel
from rat_jax.sampling.generation import generate
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
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{PROMPTS[0]}{expected[PROMPTS[0]]}\n"


def test_many_prompts_from_flags_and_file_in_batches(workdir, expected, tmp_path, capsys):
    prompts_file, output_file = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    prompts_file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS[2:]))
    flags = [f"--prompts_file={prompts_file}", f"--output_file={output_file}", "--batch_size=2"]
    prompts = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]
    assert call_script("generate.py", "--workdir", workdir, *prompts, *flags, *SETTINGS) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = [json.loads(line) for line in output_file.read_text().splitlines()]
    assert {line["prompt"]: line["completion"] for line in lines} == expected
    for index, prompt in enumerate(PROMPTS):
        assert f"--- {index + 1} of 4 ---\n{prompt}{expected[prompt]}\n" in printed.out


def test_errors_are_one_line(workdir, tmp_path, capsys):
    done = run_script("generate.py", "--workdir", tmp_path / "missing", "--prompt=a")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no workdir")
    assert done.stderr.count("\n") == 1

    assert call_script("generate.py", "--workdir", workdir, "--prompt=a", "--top_p=0") == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "error: top_p must be above 0 and at most 1, got 0.0\n")
