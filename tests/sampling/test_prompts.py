"""Prompts from files, and the tokenizer that belongs to a model."""

import itertools
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rat_jax.checkpoints.workdir import Workdir
from rat_jax.data import DataError
from rat_jax.data.tokenizer import IdTokenizer
from rat_jax.files import FileError
from rat_jax.sampling.output_file import added_fields
from rat_jax.sampling.prompt_list import PromptList
from rat_jax.sampling.prompts import (
    OUTPUT_FIELDS,
    Prompt,
    PromptError,
    encode_prompt,
    find_tokenizer,
    iterate_prompts,
    read_prompts,
)
from tests.tiny_run import make_corpus, tiny_config


def texts(path) -> list[str]:
    return [prompt.text for prompt in read_prompts(path)]


def test_prompts_of_a_text_file(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffone\r\n\n two \u2028 still two\nlast".encode())
    assert texts(tmp_path / "prompts.txt") == ["one", " two \u2028 still two", "last"]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.JSONL", "prompts.ndjson"])
def test_prompts_of_a_json_lines_file(tmp_path, name):
    (tmp_path / name).write_bytes(b'\xef\xbb\xbf{"prompt": "a\\nb", "id": 1}\r\n\n  \n{"prompt": ""}\n')
    prompts = read_prompts(tmp_path / name)
    assert [prompt.text for prompt in prompts] == ["a\nb", ""]
    assert [prompt.fields for prompt in prompts] == [{"prompt": "a\nb", "id": 1}, {"prompt": ""}]
    assert prompts[1].place == f"{tmp_path / name}, line 4"


def test_prompts_of_a_json_array(tmp_path):
    (tmp_path / "prompts.json").write_text('["a", {"prompt": "b", "tags": [1, null]}]')
    prompts = read_prompts(tmp_path / "prompts.json")
    assert [prompt.fields for prompt in prompts] == [{"prompt": "a"}, {"prompt": "b", "tags": [1, None]}]
    for content, message in (
        ('{"prompt": "a"}', "expected an array of prompts, got {'prompt': 'a'}; JSON lines are called .jsonl"),
        ('["a", 3]', "item 2: expected an object"),
        ('["a"', "is not JSON"),
        ('[{"prompt": "a"}]\n[{"prompt": "b"}]', "is not JSON: Extra data"),
    ):
        (tmp_path / "prompts.json").write_text(content)
        with pytest.raises(PromptError, match=message):
            read_prompts(tmp_path / "prompts.json")


@pytest.mark.parametrize("line", ['{"text": "a"}', '{"prompt": 3}', '["a"]', "3", "null"])
def test_lines_that_hold_no_prompt_are_refused(tmp_path, line):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(PromptError, match="line 2: expected an object"):
        read_prompts(tmp_path / "prompts.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("text", "is not JSON: Expecting value"),
        ('{"prompt": "a", "x": NaN}', "is not JSON: NaN is no number of JSON"),
        ('{"prompt": "a", "x": 1e999}', "is not JSON: 1e999 is too large a number"),
        ('{"prompt": "a", "x": ' + "9" * 5000 + "}", "is not JSON: "),
        ('{"prompt": "a", "x": ' + "[" * 10_000 + "]" * 10_000 + "}", "is not JSON: maximum recursion depth"),
        (r'{"prompt": "a\ud83d"}', r"'\\ud83d' at position 1 is no character"),
        ('{"prompt": "a", "completion": "b"}', "has a field 'completion', which the output adds"),
    ],
)
def test_lines_that_no_output_could_hold_are_refused(tmp_path, line, message):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(PromptError, match=f"line 2: {message}"):
        read_prompts(tmp_path / "prompts.jsonl")


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(FileError, match=r"missing\.txt cannot be read: No such file"):
        read_prompts(tmp_path / "missing.txt")
    with pytest.raises(FileError, match="cannot be read: Is a directory"):
        read_prompts(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"a\n\xe9t\xe9")
    with pytest.raises(PromptError, match=r"latin\.txt, line 2: is not UTF-8"):
        read_prompts(tmp_path / "latin.txt")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from(["p.txt", "p.json", "p.jsonl"]),
    st.binary(max_size=40) | st.text(max_size=20).map(lambda text: json.dumps([text]).encode()),
    st.sampled_from([b"", b'{"prompt": "a"}\n', b'["a", ', b'{"prompt": "a", "b": ', b"\xff\xfe"]),
)
def test_no_prompts_file_is_a_traceback(tmp_path_factory, name, content, before):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(before + content)
    try:
        prompts = read_prompts(path)
    except PromptError as error:
        assert str(error).startswith(str(path))
    else:
        json.dumps([[prompt.text.encode().decode(), prompt.fields] for prompt in prompts], allow_nan=False)


def test_a_prompt_that_a_tokenizer_refuses_is_named():
    prompts = [Prompt.of("1 2", "--prompt number 1"), Prompt.of("text", "--prompt number 2")]
    assert encode_prompt(prompts[0], IdTokenizer(29, 0)) == [1, 2]
    with pytest.raises(PromptError, match="--prompt number 2: this tokenizer reads token ids"):
        encode_prompt(prompts[1], IdTokenizer(29, 0))
    assert encode_prompt(Prompt.of("", ""), IdTokenizer(29, 4)) == [4]


def test_lines_are_read_one_by_one_and_a_bad_one_stands_for_itself(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\n{"prompt"\n\xff\n{"prompt": "b"}\n' + b"?\n" * 100_000)
    lines = iterate_prompts(path)
    shown = [str(line) if isinstance(line, PromptError) else line.text for line in itertools.islice(lines, 4)]
    assert [shown[0], shown[3]] == ["a", "b"]
    assert shown[1].startswith(f"{path}, line 3: is not JSON")
    assert shown[2].startswith(f"{path}, line 4: is not UTF-8")
    path.write_bytes(b"")  # the rest was not read: all but what a file reads ahead
    assert sum(1 for _ in lines) < 100_000
    path.write_text('[3, "a"]')
    path = path.rename(tmp_path / "prompts.json")
    assert [isinstance(prompt, PromptError) for prompt in iterate_prompts(path)] == [True, False]


def test_a_list_of_prompts_gives_them_again_and_again(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "b", "sample": 1}\n')
    prompts = PromptList(["a"], path, OUTPUT_FIELDS)
    for _ in range(2):
        assert [prompt.text for prompt in prompts] == ["a", "b"]
    _, refused = PromptList(["a"], path, added_fields(2, False))
    assert "line 1: has a field 'sample', which the output adds" in str(refused)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PromptError, match="pipe is no file, and prompts are read more than once"):
        PromptList([], tmp_path / "pipe", OUTPUT_FIELDS)


def test_the_tokenizer_of_the_workdir_or_else_of_the_data(tmp_path):
    corpus = make_corpus(tmp_path)
    config = tiny_config(corpus)
    workdir = Workdir(tmp_path / "run")
    assert find_tokenizer(workdir, config, None) == IdTokenizer(29, 0)
    assert find_tokenizer(workdir, tiny_config("nowhere"), str(corpus)) == IdTokenizer(29, 0)
    with pytest.raises(
        DataError, match="nowhere, which the model was trained on, is not there: name a corpus with --data_path"
    ):
        find_tokenizer(workdir, tiny_config("nowhere"), None)
    with pytest.raises(DataError, match="has a vocabulary of 29, but the model's is 30"):
        find_tokenizer(workdir, tiny_config(corpus, model__vocab_size=30), None)
    workdir.tokenizer.mkdir(parents=True)
    IdTokenizer(29, 1).save(workdir.tokenizer)
    assert find_tokenizer(workdir, config, None) == IdTokenizer(29, 1)
    with pytest.raises(DataError, match="was made by another tokenizer"):
        find_tokenizer(workdir, config, str(corpus))
