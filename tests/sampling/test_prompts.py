"""Prompts from files, texts to files, and the tokenizer that belongs to a model."""

import json

import pytest

from rat_jax.checkpoints.workdir import Workdir
from rat_jax.data import DataError
from rat_jax.data.tokenizer import ByteTokenizer, IdTokenizer
from rat_jax.sampling.completions import CompletionWriter
from rat_jax.sampling.prompts import PromptError, find_tokenizer, read_prompts
from tests.tiny_run import make_corpus, tiny_config


def test_prompts_of_a_text_file(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("one\r\n\n two \u2028 still two\nlast".encode())
    assert read_prompts(tmp_path / "prompts.txt") == ["one", " two \u2028 still two", "last"]


def test_prompts_of_a_json_lines_file(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a\\nb", "id": 1}\n\n{"prompt": ""}\n')
    assert read_prompts(tmp_path / "prompts.jsonl") == ["a\nb", ""]


@pytest.mark.parametrize("line", ["text", '{"text": "a"}', '{"prompt": 3}', '["a"]', "3"])
def test_lines_that_hold_no_prompt_are_refused(tmp_path, line):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(PromptError, match="line 2: expected an object"):
        read_prompts(tmp_path / "prompts.jsonl")


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(PromptError, match=r"missing\.txt cannot be read: No such file"):
        read_prompts(tmp_path / "missing.txt")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(PromptError, match=r"latin\.txt is not UTF-8"):
        read_prompts(tmp_path / "latin.txt")


def test_texts_grow_by_whole_characters(tmp_path, capsys):
    texts = CompletionWriter(["é"], ByteTokenizer(), tmp_path / "texts.jsonl")
    assert texts.prompt_ids == [[0xC3, 0xA9]]
    shown = []
    for ids in ([0xE2, 0x82], [0xAC, 0x21], [0xC3], []):
        texts.add(0, ids)
        shown.append(capsys.readouterr().out)
    assert shown == ["é", "€!", "", "\ufffd\n"]
    assert json.loads((tmp_path / "texts.jsonl").read_text()) == {"prompt": "é", "completion": "€!\ufffd"}


def test_an_output_file_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "texts.jsonl").write_text("precious")
    with pytest.raises(PromptError, match="is there already"):
        CompletionWriter(["a"], ByteTokenizer(), tmp_path / "texts.jsonl")
    texts = CompletionWriter(["a"], ByteTokenizer(), tmp_path / "missing" / "texts.jsonl")
    with pytest.raises(PromptError, match="cannot be written: No such file"):
        texts.add(0, [])


def test_the_tokenizer_of_the_workdir_or_else_of_the_data(tmp_path):
    corpus = make_corpus(tmp_path)
    config = tiny_config(corpus)
    workdir = Workdir(tmp_path / "run")
    assert find_tokenizer(workdir, config, None) == IdTokenizer(29, 0)
    assert find_tokenizer(workdir, tiny_config("nowhere"), str(corpus)) == IdTokenizer(29, 0)
    with pytest.raises(DataError, match="nowhere is not a prepared corpus"):
        find_tokenizer(workdir, tiny_config("nowhere"), None)
    with pytest.raises(DataError, match="has a vocabulary of 29, but the model's is 30"):
        find_tokenizer(workdir, tiny_config(corpus, model__vocab_size=30), None)
    workdir.tokenizer.mkdir(parents=True)
    IdTokenizer(29, 1).save(workdir.tokenizer)
    assert find_tokenizer(workdir, config, None) == IdTokenizer(29, 1)
    with pytest.raises(DataError, match="was made by another tokenizer"):
        find_tokenizer(workdir, config, str(corpus))
