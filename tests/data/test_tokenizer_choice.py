import pytest

from rat_jax.data import DataError
from rat_jax.data.tokenizer import ByteTokenizer, IdTokenizer, train_bpe
from rat_jax.data.tokenizer_choice import absolute_tokenizer, is_path, parse_tokenizer


def test_every_form(tmp_path, monkeypatch):
    assert parse_tokenizer("bytes", None) == ByteTokenizer()
    assert parse_tokenizer("bpe:300", None) == 300
    assert parse_tokenizer("ids:9:2", None) == IdTokenizer(9, 2)
    tokenizer = train_bpe(["one two " * 50], 260)
    (tmp_path / "folder").mkdir()
    tokenizer.save(tmp_path / "folder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for spec in ("folder", "./folder", "~/folder", str(tmp_path / "folder")):
        assert parse_tokenizer(spec, None).hash == tokenizer.hash
        assert absolute_tokenizer(spec) == str(tmp_path / "folder")
    assert parse_tokenizer("folder/tokenizer.json", "<|endoftext|>").hash == tokenizer.hash
    for spec in ("bytes", "bpe:300", "ids:9:2", "gpt2"):
        assert not is_path(spec)
        assert absolute_tokenizer(spec) == spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpt2", "--tokenizer gpt2: expected bytes, bpe:SIZE"),
        ("bytes:1", "expected bytes, bpe:SIZE"),
        ("bpe", "expected bytes, bpe:SIZE"),
        ("bpe:", "must be a number"),
        ("bpe:many", "must be a number"),
        ("bpe:256", "is below 257"),
        ("ids:5:5", r"is outside 0 \.\. 4"),
        ("gone.json", r"gone\.json cannot be read"),
    ],
)
def test_what_is_refused(spec, message):
    with pytest.raises(DataError, match=message):
        parse_tokenizer(spec, None)
