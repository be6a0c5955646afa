import json
import os
import pickle
import random

import numpy as np
import pytest

from rat_jax.data import DataError
from rat_jax.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    IdTokenizer,
    Tokenizer,
    _training_pieces,
    library_errors,
    load_tokenizer,
    token_dtype,
    train_bpe,
)
from rat_jax.data.tokenizer_files import read_tokenizer
from rat_jax.files import FileError
from rat_jax.sampling.stream_decoder import StreamDecoder
from tests.data.damage import damaged, damaged_values

TEXTS = [
    "",
    "plain words",
    "  leading, two  inner   and trailing spaces  ",
    "tabs\tand\nlines\r\n\n",
    "naïve café €5 🦊 漢字 \U0001f469\u200d\U0001f680",
    "literal <|endoftext|> and </s> and <s> are text",
    "\x00\x7f control",
]


@pytest.fixture(scope="module")
def tokenizers(sentencepiece_model, tmp_path_factory) -> dict[str, Tokenizer]:
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(sentencepiece_model)
    return {
        "bytes": ByteTokenizer(),
        "bpe": train_bpe(iter(TEXTS * 3), 300),
        "byte_fallback": byte_fallback_tokenizer(),
        "sentencepiece": read_tokenizer(path, None),
    }


def byte_fallback_tokenizer() -> HuggingFaceTokenizer:
    """A `tokenizer.json` as LLaMA's is converted: spaces as "▁", bytes for unknown characters, a space put before."""
    import tokenizers as library
    from tokenizers import decoders, models, normalizers

    pieces = ["<s>", "</s>", "▁", *map(chr, range(33, 127)), *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = library.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return HuggingFaceTokenizer(tokenizer.to_str().encode(), 1)


@pytest.fixture(params=["bytes", "bpe", "byte_fallback", "sentencepiece"])
def tokenizer(request, tokenizers) -> Tokenizer:
    return tokenizers[request.param]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eos_id for i in ids)


@pytest.mark.parametrize("text", TEXTS)
def test_document_is_ids_and_end(tokenizer, text):
    document = tokenizer.encode_document(text)
    assert document.dtype == token_dtype(tokenizer.vocab_size) == np.uint16
    assert document.tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
    assert tokenizer.decode(document.tolist()) == text


@pytest.mark.parametrize(
    "text",
    ["".join(TEXTS), "".join(TEXTS) * 5, "🦊" * 40, "€" * 60, " " * 100 + "x", "x  y   z" * 30, "\ufffd real \ufffd"],
)
def test_stream_is_the_text(tokenizer, text):
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(i) for i in tokenizer.encode(text)]
    assert "".join(pieces) + decoder.flush() == text


@pytest.mark.parametrize("text", TEXTS)
def test_stream_of_several_ids_at_once(tokenizer, text):
    decoder, ids = StreamDecoder(tokenizer), tokenizer.encode(text)
    pieces = [decoder.push(ids[i : i + 3]) for i in range(0, len(ids), 3)]
    assert "".join(pieces) + decoder.flush() == text


def test_stream_of_any_ids_is_their_text(tokenizer):
    """Stray bytes, half characters, ends of documents: what a model draws at random."""
    generator = random.Random(0)
    byte_ids = sorted(tokenizer.byte_ids) or range(3 if tokenizer.kind == "sentencepiece" else 0, 259)
    runs = [*("é€🦊漢".encode()), *(0xC3, 0xE2, 0x82, 0xF0, 0xFF, 0x80, 0x41)]
    for _ in range(100):
        ids = []
        while len(ids) < 150:
            match generator.randrange(4):
                case 0:
                    ids += tokenizer.encode(generator.choice(TEXTS))[: generator.randrange(9)]
                case 1:
                    ids += [byte_ids[byte] for byte in generator.choices(runs, k=generator.randrange(9))]
                case 2:
                    ids += [*(byte_ids[byte] for byte in "é€🦊".encode()), tokenizer.eos_id]
                case 3:
                    ids += generator.choices([*range(tokenizer.vocab_size), tokenizer.eos_id], k=generator.randrange(4))
        decoder, pieces, done = StreamDecoder(tokenizer), [], 0
        while done < len(ids):
            count = generator.choice([1, 1, 1, 5])
            pieces.append(decoder.push(ids[done : done + count]))
            done += count
        assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)


def test_stream_holds_back_a_run_of_bytes(tokenizers):
    tokenizer = tokenizers["byte_fallback"]
    (a,), (b,) = (tokenizer.encode(text)[1:] for text in "ab")
    fox, stray = tokenizer.encode("🦊")[1:], tokenizer.encode("€")[1]
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(i) for i in (a, *fox, b)] == ["a", "", "", "", "", "🦊b"]
    assert [decoder.push(i) for i in (*fox, stray, a)] == ["", "", "", "", "", "\ufffd" * 5 + "a"]
    assert decoder.push(fox) == ""
    assert decoder.flush() == "🦊"


@pytest.mark.parametrize("prompt", ["ends in 🦊", "🦊", "ends in \ufffd", "", "x"])
def test_stream_after_a_prompt_is_what_follows(tokenizer, prompt):
    following = "".join(TEXTS) * 2
    prompt_ids = tokenizer.encode(prompt)
    ids = tokenizer.encode(prompt + following)
    if ids[: len(prompt_ids)] != prompt_ids:
        pytest.skip("the prompt's last word goes on")
    decoder = StreamDecoder(tokenizer)
    decoder.begin(prompt_ids)
    pieces = [decoder.push(i) for i in ids[len(prompt_ids) :]]
    assert "".join(pieces) + decoder.flush() == following


def test_a_stray_byte_does_not_change_the_prompt(tokenizers):
    tokenizer = tokenizers["byte_fallback"]
    decoder = StreamDecoder(tokenizer)
    decoder.begin(tokenizer.encode("a🦊"))
    (b,), stray = tokenizer.encode("b")[1:], tokenizer.encode("€")[1]
    assert [decoder.push(i) for i in (stray, b)] == ["", "\ufffdb"]


def test_stream_holds_back_half_a_character():
    decoder = StreamDecoder(ByteTokenizer())
    assert [decoder.push(byte) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]
    assert decoder.push(0xE2) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.push(ord("c")) == "c"


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert (loaded.vocab_size, loaded.eos_id, loaded.hash) == (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.hash)
    text = "".join(TEXTS)
    assert loaded.encode(text) == tokenizer.encode(text)


def test_pickle(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.hash == tokenizer.hash
    assert copy.encode(TEXTS[4]) == tokenizer.encode(TEXTS[4])


def test_hashes_differ(tokenizers):
    others = [train_bpe(iter(TEXTS * 3), 290), IdTokenizer(257, 256), IdTokenizer(257, 0)]
    assert len({tokenizer.hash for tokenizer in [*tokenizers.values(), *others]}) == 7


def test_sentencepiece_is_the_paper_recipe(tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    assert tokenizer.eos_id == 2
    assert 1 not in tokenizer.encode("some text")  # no BOS


def test_bpe_merges_and_is_reproducible(tokenizers):
    tokenizer = tokenizers["bpe"]
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode(TEXTS[2])) < len(TEXTS[2].encode())
    assert train_bpe(iter(TEXTS * 3), 300).hash == tokenizer.hash


def test_bpe_sizes():
    with pytest.raises(DataError, match="bpe:256 is below 257"):
        train_bpe(iter(TEXTS), 256)
    with pytest.raises(DataError, match=r"too small for bpe:5000: .* use bpe:\d+ or less"):
        train_bpe(iter(TEXTS), 5000)


def test_bpe_in_pieces_changes_nothing(monkeypatch):
    """Pieces end where words do: the words, and so the merges, are those of the whole text."""
    text = "".join(TEXTS) + "\n\n  indented\t\n don't  stop \n" * 9 + "no line end " * 400
    whole = train_bpe([text], 300)
    ids = [*whole.encode(text), whole.eos_id]
    monkeypatch.setattr("rat_jax.data.tokenizer._PIECE_CHARACTERS", 50)
    pieces = list(_training_pieces(text))
    assert "".join(pieces) == text
    assert len(pieces) > 50
    assert train_bpe([text], 300).hash == whole.hash
    assert whole.encode_document(text).tolist() == ids


@pytest.mark.parametrize("word", ["ab1", "é", "中文", "-", "_", "=\u0301", " ", "\n", " \t\n"])
def test_long_words_are_cut_for_bpe_training(word):
    """The trainer's cost grows with the square of a word's length."""
    text = f"before {word * 20_000} after {word * 100} " * 2
    pieces = list(_training_pieces(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 1000 + 1000 + len("  after  before ")  # a cut, and what follows up to the next
    assert list(_training_pieces("words and more of them. " * 500)) == ["words and more of them. " * 500]


def test_ids():
    tokenizer = IdTokenizer(10, 0)
    assert tokenizer.encode("3 1 4") == [3, 1, 4]
    assert tokenizer.encode(tokenizer.decode([3, 1, 4])) == [3, 1, 4]
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(i) for i in (3, 0, 4)] == ["3 ", "", "4 "]
    with pytest.raises(DataError, match="id 10 at position 1 is outside the vocabulary of 10"):
        tokenizer.encode("3 10")
    with pytest.raises(DataError, match="ids separated by spaces"):
        tokenizer.encode("three")
    with pytest.raises(DataError, match=r"holds '3 0' .* which becomes 0, the id that ends a document"):
        tokenizer.encode("3 0 4")
    with pytest.raises(DataError, match=r"outside 0 \.\. 9"):
        IdTokenizer(10, 10)


def test_halves_of_surrogate_pairs_are_refused(tokenizer):
    for encode in (tokenizer.encode, tokenizer.encode_document):
        with pytest.raises(DataError, match=r"half of a surrogate pair, .*'ab.ud83ec' \(character 2\)"):
            encode("ab\ud83ec")


def test_decode_refuses_foreign_ids(tokenizer):
    with pytest.raises(DataError, match="at position 1 is outside the vocabulary"):
        tokenizer.decode([1, tokenizer.vocab_size])
    with pytest.raises(DataError, match="id -1 at position 0"):
        tokenizer.decode([-1])


def test_huggingface_adds_nothing_and_cuts_nothing(tokenizers):
    """A file with a BOS template, truncation and padding, as published ones have, gives the ids of the text alone."""
    import tokenizers as library
    from tokenizers import processors

    plain = tokenizers["bpe"]
    changed = library.Tokenizer.from_buffer(plain.model[1])
    changed.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    changed.enable_truncation(4)
    changed.enable_padding(length=5000)
    text = "".join(TEXTS)
    assert HuggingFaceTokenizer(changed.to_str().encode(), 0).encode(text) == plain.encode(text)


def test_load_refuses_what_was_changed(tokenizers, tmp_path):
    with pytest.raises(DataError, match=r"holds no tokenizer: .*tokenizer_info\.json is missing"):
        load_tokenizer(tmp_path)
    tokenizers["bpe"].save(tmp_path)
    other = train_bpe(iter(TEXTS * 3), 290)
    (tmp_path / "tokenizer.json").write_bytes(other.model[1])
    with pytest.raises(DataError, match="not the one that was saved there"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_info.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "words"}, "unknown kind of tokenizer 'words'"),
        ({"kind": None}, "kind must be text, got None"),
        ({"vocab_size": "300"}, "vocab_size must be a whole number, got '300'"),
        ({"eos_id": 300}, "eos_id 300, vocab_size 300"),
        ({"eos_id": -1}, "eos_id -1, vocab_size 300"),
        ({"hash": "x"}, "hash is no SHA-256"),
    ],
)
def test_info_that_cannot_be(tokenizers, tmp_path, changes, message):
    tokenizers["bpe"].save(tmp_path)
    path = tmp_path / "tokenizer_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(DataError, match=rf"tokenizer_info\.json is damaged: {message}"):
        load_tokenizer(tmp_path)


def test_damaged_tokenizers_are_refused_or_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    generator = random.Random(0)
    paths = sorted(tmp_path.iterdir())
    for path in paths:
        content = path.read_bytes()
        for _ in range(100):
            path.write_bytes(damaged(content, generator))
            try:
                assert load_tokenizer(tmp_path).hash == tokenizer.hash
            except DataError as error:
                assert str(tmp_path) in str(error)
        path.write_bytes(content)
    path, values = tmp_path / "tokenizer_info.json", json.loads((tmp_path / "tokenizer_info.json").read_text())
    for _ in range(100):
        path.write_text(json.dumps(damaged_values(values, generator)))
        with pytest.raises(DataError, match=str(tmp_path)):
            load_tokenizer(tmp_path)


def test_what_the_libraries_raise_is_refused_and_signals_are_not():
    class PanicException(BaseException):  # as pyo3's, which no module has
        pass

    for error in (Exception("two\nlines"), RuntimeError("two lines"), PanicException("two lines")):
        with pytest.raises(DataError, match="the file is damaged: two lines"), library_errors("the file is damaged"):
            raise error
    with pytest.raises(KeyboardInterrupt), library_errors("the file is damaged"):
        raise KeyboardInterrupt


def test_a_save_that_is_cut_off_leaves_what_was_there(tokenizers, tmp_path, monkeypatch):
    tokenizers["bpe"].save(tmp_path)
    monkeypatch.setattr(os, "replace", lambda source, target: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(FileError, match=r"tokenizer\.json cannot be written: No space left; make room on its disk"):
        train_bpe(iter(TEXTS * 3), 290).save(tmp_path)
    assert load_tokenizer(tmp_path).hash == tokenizers["bpe"].hash


def test_dtype_by_vocabulary():
    assert token_dtype(2**16) == np.uint16
    assert token_dtype(2**16 + 1) == np.uint32
