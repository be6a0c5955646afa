import base64
import io
import json
import random

import pytest

from rat_jax.data import DataError
from rat_jax.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, train_bpe
from rat_jax.data.tokenizer_files import read_tokenizer
from tests.data.damage import damaged, damaged_values

TEXTS = ["plain words and more of them </s>", "naïve café €5 🦊 漢字", "<|endoftext|> as text"] * 3


@pytest.fixture(scope="module")
def bpe() -> HuggingFaceTokenizer:
    return train_bpe(iter(TEXTS), 300)


def write(path, values):
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def test_huggingface_file(bpe, tmp_path):
    name, content = bpe.model
    path = tmp_path / name
    path.write_bytes(content)
    assert read_tokenizer(path, "<|endoftext|>").hash == bpe.hash
    with pytest.raises(DataError, match="does not say which token ends a document: name it with --eos_token"):
        read_tokenizer(path, None)
    with pytest.raises(DataError, match="has no token '<end>'"):
        read_tokenizer(path, "<end>")
    for eos_token in ("<|endoftext|>", {"content": "<|endoftext|>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
        assert read_tokenizer(path, None).eos_id == 0
    (tmp_path / "corpus").mkdir()
    bpe.save(tmp_path / "corpus")
    assert read_tokenizer(tmp_path / "corpus", None).hash == bpe.hash
    with pytest.raises(DataError, match="leave --eos_token out"):
        read_tokenizer(tmp_path / "corpus", "<|endoftext|>")


@pytest.mark.parametrize("content", ["", "{}", "null", "[" * 100_000, '{"model": {}}', "\ufeff{}"])
def test_no_tokenizer_json(tmp_path, content):
    path = write(tmp_path / "tokenizer.json", content)
    with pytest.raises(DataError, match=rf"tokenizer {path} is not a tokenizer\.json: "):
        read_tokenizer(path, "<|endoftext|>")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"eos_token": 3}', '{"eos_token": {"content": []}}', '{"eos_token": ""}', "[" * 100_000]
)
def test_damaged_tokenizer_config(bpe, tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(bpe.model[1])
    path = write(tmp_path / "tokenizer_config.json", content)
    with pytest.raises(DataError, match=rf"{path} is damaged: "):
        read_tokenizer(tmp_path / "tokenizer.json", None)
    read_tokenizer(tmp_path / "tokenizer.json", "<|endoftext|>")  # which does not need it


@pytest.mark.parametrize("content", ["{}", '{"eos_token": null}', '{"eos_token": {}}'])
def test_tokenizer_config_without_an_end(bpe, tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(bpe.model[1])
    write(tmp_path / "tokenizer_config.json", content)
    with pytest.raises(DataError, match="does not say which token ends a document: name it with --eos_token"):
        read_tokenizer(tmp_path / "tokenizer.json", None)


def test_an_end_that_is_an_ordinary_added_token_is_refused(bpe, tmp_path):
    values = json.loads(bpe.model[1])
    (token,) = values["added_tokens"]
    assert token["special"]
    token["special"] = False
    path = write(tmp_path / "tokenizer.json", values)
    message = r"tokenizer\.json: '<\|endoftext\|>' cannot end documents, since the text .* holds it as well; mark it as"
    with pytest.raises(DataError, match=message):
        read_tokenizer(path, "<|endoftext|>")
    tokenizer = HuggingFaceTokenizer(path.read_bytes(), 0)  # as it was read before, from an older folder
    assert 0 not in tokenizer.encode("nothing special")
    text = "words " * 5000 + "<|endoftext|>" + " more" * 5000
    with pytest.raises(DataError, match=r"holds '.*words words <\|endoftext\|>' \(characters up to 30013\), which"):
        tokenizer.encode_document(text)


def test_an_end_that_stands_for_unknown_words_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    model = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    model.add_special_tokens(["<unk>"])
    path = write(tmp_path / "tokenizer.json", model.to_str())
    with pytest.raises(DataError, match="'<unk>' cannot end documents"):
        read_tokenizer(path, "<unk>")


def test_a_text_that_the_library_refuses(tmp_path):
    from tokenizers import Tokenizer, models

    model = Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>"))
    model.add_special_tokens(["</s>"])
    path = write(tmp_path / "tokenizer.json", model.to_str())
    tokenizer = read_tokenizer(path, "</s>")
    assert tokenizer.encode("a") == [0]
    with pytest.raises(DataError, match=r"has no ids for the text 'b c': WordLevel error: Missing \[UNK\]"):
        tokenizer.encode("b c")


def test_sentencepiece_file(tmp_path, sentencepiece_model):
    path = tmp_path / "x.model"
    path.write_bytes(sentencepiece_model)
    assert read_tokenizer(path, "<s>").eos_id == 1
    with pytest.raises(DataError, match="has no token <end>"):
        read_tokenizer(path, "<end>")
    path.write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"x\.model is not a SentencePiece model"):
        read_tokenizer(path, None)


def test_files_that_are_not_tokenizers(tmp_path):
    with pytest.raises(DataError, match=r"gone\.model cannot be read: No such file"):
        read_tokenizer(tmp_path / "gone.model", None)


@pytest.mark.parametrize("option", ["user_defined_symbols", "control_symbols"])
def test_only_control_symbols_end_documents(tmp_path, option):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
        **{option: ["<end>"]},
    )
    path = tmp_path / "x.model"
    path.write_bytes(model.getvalue())
    if option == "control_symbols":
        tokenizer = read_tokenizer(path, "<end>")
        assert tokenizer.decode(tokenizer.encode("text <end> text")) == "text <end> text"
        return
    for token in ("<end>", "<unk>", "<0x0A>"):
        with pytest.raises(DataError, match=rf"x\.model: '{token}' cannot end documents, since it is not a control"):
            read_tokenizer(path, token)
    tokenizer = SentencePieceTokenizer(model.getvalue(), 3)  # as it was read before, from an older folder
    assert tokenizer.encode("nothing special")
    with pytest.raises(
        DataError, match=r"holds 'text <end>' \(characters up to 10\), which becomes 3, the id that ends"
    ):
        tokenizer.encode("text <end> text")


def test_tiktoken_files_are_named(tmp_path):
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)]
    for name in ("tokenizer.model", "qwen.tiktoken"):
        path = write(tmp_path / name, "".join(lines))
        with pytest.raises(DataError, match=r"is of tiktoken's format .*: use the tokenizer\.json"):
            read_tokenizer(path, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 1\n",
            "is a pointer of Git LFS, not the file",
        ),
        ("\n<!DOCTYPE html><title>Sign in</title>", "is a web page, not the file"),
        ('{"config": {"pattern": "x"}, "vocab": [{"rank": 0, "token_bytes": "AA=="}]}', "of Mistral's format Tekken"),
    ],
)
def test_what_is_often_there_instead_is_named(tmp_path, content, message):
    for name in ("tokenizer.model", "tokenizer.json"):
        with pytest.raises(DataError, match=rf"{name} is .*{message}|{name} {message}"):
            read_tokenizer(write(tmp_path / name, content), None)


def use(path, eos_token) -> None:
    """Reads a file and, if it is accepted, encodes and decodes with it."""
    tokenizer = read_tokenizer(path, eos_token)
    for text in TEXTS[:3]:
        try:
            ids = tokenizer.encode(text)
        except DataError:
            continue
        assert tokenizer.eos_id not in ids
        assert isinstance(tokenizer.decode(ids), str)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_files_are_refused_or_tokenizers(bpe, sentencepiece_model, tmp_path, seed):
    generator = random.Random(seed)
    bytes_of = {"x.model": sentencepiece_model, "tokenizer.json": bpe.model[1]}
    values = json.loads(bpe.model[1])
    refused = 0
    for _ in range(100):
        changed = {name: damaged(content, generator) for name, content in bytes_of.items()}
        changed["values.json"] = json.dumps(damaged_values(values, generator)).encode()
        for name, content in changed.items():
            path = tmp_path / name
            path.write_bytes(content)
            try:
                use(path, None if name == "x.model" else "<|endoftext|>")
            except DataError as error:
                refused += 1
                assert str(path) in str(error)
    assert 50 < refused < 300


def test_a_prefix_that_the_merges_lack_is_refused_before_the_library_ends_the_process(tmp_path):
    content = json.loads(train_bpe(["import os\nimport re\n"], 262).model[1])
    content["model"]["continuing_subword_prefix"] = "##"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="continuing_subword_prefix is '##', with which its merges do not begin"):
        read_tokenizer(tmp_path / "tokenizer.json", "<|endoftext|>")
