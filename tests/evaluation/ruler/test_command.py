"""The command that writes examples."""

import hashlib
import json

import pytest

from rat_jax.data.tokenizer import ByteTokenizer
from rat_jax.evaluation.ruler import make_example
from rat_jax.evaluation.ruler.__main__ import main
from rat_jax.program import exit_code
from rat_jax.sampling.prompts import read_prompts
from tests.evaluation.ruler.conftest import ESSAY


def arguments(tmp_path, **changes):
    values = {
        "tokenizer": "bytes",
        "task": "niah_single_1",
        "length": 512,
        "num": 2,
        "split": "train",
        "templates": "own",
        "out": tmp_path / "out.jsonl",
    }
    return [f"--{name}={value}" for name, value in (values | changes).items() if value is not None]


def test_lines_hold_examples_and_their_settings(tmp_path, settings, capsys):
    (tmp_path / "essay.txt").write_text(ESSAY)
    essay = tmp_path / "essay.txt"
    main(arguments(tmp_path, task="niah_single_1,niah_single_2", essay=essay, seed=3, depths=3, length=1024))
    assert capsys.readouterr().out == f"{tmp_path / 'out.jsonl'}: 4 examples\n"
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(line["task"], line["index"]) for line in lines] == [
        ("niah_single_1", 0),
        ("niah_single_2", 0),
        ("niah_single_1", 1),
        ("niah_single_2", 1),
    ]
    made = settings(seed=3, split="train", num_depths=3, context_length=1024)
    for line in lines:
        example = make_example(line["task"], line["index"], ByteTokenizer(), made)
        assert line == example.as_json() | {
            "length": 1024,
            "tokenizer_hash": ByteTokenizer().hash,
            "split": "train",
            "seed": 3,
            "templates": "rat_jax (Apache-2.0)",
            "words": "generated",
            "essay": str(essay),
            "essay_hash": hashlib.sha256(ESSAY.encode()).hexdigest(),
            "bos": False,
        }
    assert [prompt.text for prompt in read_prompts(tmp_path / "out.jsonl")] == [line["prompt"] for line in lines]
    assert not list(tmp_path.glob("*.partial"))


def test_prompts_fit_the_tokenizer_of_a_corpus(tmp_path, tokenizers):
    tokenizers["bpe"].save(tmp_path)
    main(arguments(tmp_path, tokenizer=tmp_path, task="fwe"))
    line = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert 0.98 * 512 <= len(tokenizers["bpe"].encode(line["prompt"])) + line["answer_tokens"] <= 512


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "bpe:300"}, "--tokenizer bpe:300 is to be trained, and there is no text here"),
        ({"tokenizer": "words"}, "--tokenizer words: expected bytes"),
        ({"task": "niah_single_4"}, "there is no RULER task 'niah_single_4'"),
        ({"task": "niah_single_2"}, "niah_single_2 hides its needles in an essay"),
        ({"task": "vt,vt"}, "name one or several different tasks, got vt, vt"),
        ({"num": 0}, "--num must be 1 or more, got 0"),
        ({"length": 100}, "niah_single_1 does not fit 100 tokens"),
        ({"split": "test"}, "argument --split: invalid choice: 'test'"),
        ({"out": None}, "the following arguments are required: --out"),
        (
            {"out": "/dev/null/folder.jsonl"},
            "/dev/null cannot be written: File exists; a file, or a link",
        ),
        ({"out": "/dev/null"}, "/dev/null is there already; it is left as it is"),
        ({"essay": "no-such.txt"}, "no-such.txt"),
    ],
)
def test_what_is_refused_in_one_line(tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(tmp_path)
    code = exit_code(lambda: main(arguments(tmp_path, **changes)))
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
