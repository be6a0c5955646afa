import dataclasses
import tracemalloc

import pytest

from rat_jax.data import DataError
from rat_jax.data.sources import parse_source


def texts(spec, options):
    return [document.text for document in parse_source(str(spec), options).documents()]


@pytest.fixture
def replace(read_options):
    return dataclasses.replace(read_options, invalid_utf8="replace")


def test_text_keeps_line_ends(tmp_path, read_options):
    (tmp_path / "x.txt").write_bytes(b"a\r\nb\rc\n")
    assert texts(tmp_path, read_options) == ["a\r\nb\rc\n"]


@pytest.mark.parametrize("block", [1, 2, 3, 1000])
def test_separator(tmp_path, read_options, monkeypatch, block):
    """However the separators lie in the blocks that are read."""
    monkeypatch.setattr("rat_jax.data.text_files._BLOCK_BYTES", block)
    (tmp_path / "x.txt").write_bytes("one€||two\r\n||||three".encode())
    options = dataclasses.replace(read_options, document_separator="||")
    documents = list(parse_source(str(tmp_path), options).documents())
    assert [document.text for document in documents] == ["one€", "two\r\n", "", "three"]
    assert documents[1].name.endswith("x.txt, document 2")
    assert parse_source(str(tmp_path), options).num_documents is None


@pytest.mark.parametrize("block", [1, 2, 3, 1000])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_separator_of_line_ends(tmp_path, read_options, monkeypatch, block, end):
    """The text's line ends may be those of Windows; a separator that says so matches those alone."""
    monkeypatch.setattr("rat_jax.data.text_files._BLOCK_BYTES", block)
    (tmp_path / "x.txt").write_bytes(f"one{end}more{end}{end}two{end}---{end}three{end}".encode())
    for separator, expected in (
        ("\n\n", [f"one{end}more", f"two{end}---{end}three{end}"]),
        ("\n---\n", [f"one{end}more{end}{end}two", f"three{end}"]),
        ("\n", ["one", "more", "", "two", "---", "three", ""]),
        ("\r\n---", None if end == "\n" else ["one\r\nmore\r\n\r\ntwo", "\r\nthree\r\n"]),
    ):
        options = dataclasses.replace(read_options, document_separator=separator)
        documents = list(parse_source(str(tmp_path), options).documents())
        whole = [(tmp_path / "x.txt").read_bytes().decode()]
        assert [document.text for document in documents] == (expected or whole)
        assert all(document.separated == (len(documents) > 1) for document in documents)


def test_a_separator_that_never_comes(tmp_path, read_options, monkeypatch):
    """A document costs a few times its size, in however many blocks it is read."""
    monkeypatch.setattr("rat_jax.data.text_files._BLOCK_BYTES", 1000)
    (tmp_path / "x.txt").write_bytes(b"no end here " * 200_000)
    options = dataclasses.replace(read_options, document_separator="\n\n")
    tracemalloc.start()
    (text,) = texts(tmp_path, options)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(text) == 2_400_000
    assert most < 4 * len(text)


def test_invalid_utf8(tmp_path, read_options, replace):
    (tmp_path / "x.txt").write_bytes(b"fine\xfe")
    with pytest.raises(DataError, match=r"x\.txt is not UTF-8 at byte 4 \(0xfe\); --invalid_utf8 replace"):
        texts(tmp_path, read_options)
    assert texts(tmp_path, replace) == ["fine\ufffd"]
    with pytest.raises(DataError, match=r"x\.txt, after document 0, is not UTF-8"):
        texts(tmp_path, dataclasses.replace(read_options, document_separator="|"))
    assert texts(tmp_path, dataclasses.replace(replace, document_separator="|")) == ["fine\ufffd"]
