"""generate.py as a user runs it."""

import json

import pytest
from flax import nnx

from rat_jax.checkpoint import save_model
from rat_jax.data.tokenizer import ByteTokenizer
from rat_jax.model import LanguageModel
from rat_jax.sampling import generate
from tests.commands import run_script
from tests.tiny_run import tiny_config

SETTINGS = ["--max_new_tokens=20", "--temperature=1.5", "--top_k=100", "--seed=3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = tiny_config("nowhere", model__vocab_size=257)
    return LanguageModel(config.model, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def workdir(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate_script") / "run"
    save_model(folder, tiny_config("nowhere", model__vocab_size=257), model, step=7, tokenizer=ByteTokenizer())
    return folder


def expected(model, prompts: list[str]) -> list[str]:
    tokenizer = ByteTokenizer()
    ids = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in prompts]
    settings = {"temperature": 1.5, "top_k": 100, "seed": 3, "eos_id": tokenizer.eos_id}
    return [tokenizer.decode(row) for row in generate(model, ids, max_new_tokens=20, **settings)]


def test_one_prompt_prints_its_text(model, workdir):
    done = run_script("generate.py", "--workdir", workdir, "--prompt=naïve €", *SETTINGS)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"naïve €{expected(model, ['naïve €'])[0]}\n"


def test_many_prompts_from_flags_and_file_in_batches(model, workdir, tmp_path):
    prompts = ["first", "", "third\nline"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts[1:]))
    done = run_script(
        "generate.py",
        "--workdir",
        workdir,
        "--prompt=first",
        f"--prompts_file={tmp_path / 'prompts.jsonl'}",
        f"--output_file={tmp_path / 'texts.jsonl'}",
        "--batch_size=2",
        *SETTINGS,
    )
    assert done.returncode == 0, done.stderr
    lines = sorted(map(json.loads, (tmp_path / "texts.jsonl").read_text().splitlines()), key=lambda x: x["prompt"])
    pairs = sorted(zip(prompts, expected(model, prompts), strict=True))
    assert lines == [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    for index, prompt in enumerate(prompts):
        assert f"--- {index + 1} of 3 ---\n{prompt}" in done.stdout


def test_errors_are_one_line(workdir, tmp_path):
    def error(*arguments):
        done = run_script("generate.py", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        return done.stderr

    assert "there is no workdir" in error("--workdir", tmp_path / "missing", "--prompt=a")
    assert "nothing to continue" in error("--workdir", workdir)
    assert "top_p must be above 0" in error("--workdir", workdir, "--prompt=a", "--top_p=0", "--temperature=1")
    assert "'b' is no flag" in error("--workdir", workdir, "--prompt=a", "b")
