import dataclasses
import gzip
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from rat_jax.data import DataError
from rat_jax.data.sources import parse_source


def texts(spec, options):
    return [document.text for document in parse_source(str(spec), options).documents()]


@pytest.fixture
def replace(read_options):
    return dataclasses.replace(read_options, invalid_utf8="replace")


def test_text_files_folders_and_patterns(tmp_path, read_options):
    for name in ("b.txt", "a.md", "sub/c.txt", ".hidden", ".git/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path, read_options) == ["a.md", "b.txt", "sub/c.txt"]
    assert texts(f"text:{tmp_path}", read_options) == ["a.md", "b.txt", "sub/c.txt"]
    assert texts(tmp_path / "b.txt", read_options) == ["b.txt"]
    assert texts(tmp_path / "*.txt", read_options) == ["b.txt"]
    assert texts(f"text:{tmp_path}/**/*.txt", read_options) == ["b.txt", "sub/c.txt"]
    assert parse_source(str(tmp_path), read_options).num_documents == 3


def test_missing_sources(tmp_path, read_options):
    for spec in (tmp_path / "gone", f"text:{tmp_path}", f"jsonl:{tmp_path}", f"{tmp_path}/*.parquet", "text:", "pyton"):
        with pytest.raises(DataError, match="no such file"):
            parse_source(str(spec), read_options)


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


def test_json_lines(tmp_path, read_options):
    lines = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in ("one", "zwei €")) + "\n"
    (tmp_path / "x.jsonl").write_text(lines)
    with gzip.open(tmp_path / "y.jsonl.gz", "wt") as file:
        file.write('{"text": null}\n{"text": "\\u00e9"}')
    assert texts(tmp_path / "x.jsonl", read_options) == ["one", "zwei €"]
    assert texts(tmp_path / "y.jsonl.gz", read_options) == ["", "é"]
    assert texts(f"jsonl:{tmp_path}", read_options) == ["one", "zwei €", "", "é"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r"x\.jsonl, line 2 is not JSON"),
        (b"[1]", r"line 2 has no field 'text' \(it has: a list\)"),
        (b'{"body": "x", "id": 1}', r"line 2 has no field 'text' \(it has: body, id\); name the text with --field"),
        (b'{"text": 3}', "line 2: field 'text' must hold text, got int"),
        (b'{"text": "\xff"}', r"line 2 is not UTF-8 at byte 10 \(0xff\); --invalid_utf8 replace"),
        (b'{"text": "\\ud83e"}', "line 2 is not UTF-8"),
    ],
)
def test_json_lines_that_cannot_be_read(tmp_path, read_options, line, message):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "fine"}\n' + line)
    with pytest.raises(DataError, match=message):
        texts(tmp_path / "x.jsonl", read_options)


def test_damaged_gzip(tmp_path, read_options):
    content = gzip.compress(b'{"text": "fine"}\n' * 100)
    (tmp_path / "x.jsonl.gz").write_bytes(content[:-10])
    with pytest.raises(DataError, match=r"x\.jsonl\.gz cannot be read"):
        texts(tmp_path / "x.jsonl.gz", read_options)


@pytest.mark.parametrize("type_", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary()])
def test_parquet(tmp_path, read_options, type_):
    values = ["one", None, "zwei €"] * 200  # several batches
    table = pyarrow.table({"body": pyarrow.array(values, type_), "id": range(600)})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=100)
    options = dataclasses.replace(read_options, field="body")
    assert texts(tmp_path / "x.parquet", options) == [value or "" for value in values]
    assert texts(f"parquet:{tmp_path}", options) == [value or "" for value in values]
    assert parse_source(f"parquet:{tmp_path}", options).num_documents == 600
    with pytest.raises(DataError, match=r"x\.parquet has no column 'text' \(it has: body, id\); name one with --field"):
        texts(tmp_path / "x.parquet", read_options)
    with pytest.raises(DataError, match="column 'id' must hold text, it is of type int64"):
        texts(tmp_path / "x.parquet", dataclasses.replace(read_options, field="id"))


def test_parquet_that_cannot_be_read(tmp_path, read_options, replace):
    (tmp_path / "x.parquet").write_text("PAR1")
    with pytest.raises(DataError, match=r"x\.parquet is not a Parquet file"):
        texts(tmp_path / "x.parquet", read_options)
    table = pyarrow.table({"text": pyarrow.array([b"fine", b"\xff"], pyarrow.binary())})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet, row 2 is not UTF-8 at byte 0 \(0xff\)"):
        texts(tmp_path / "x.parquet", read_options)
    assert texts(tmp_path / "x.parquet", replace) == ["fine", "\ufffd"]


def test_invalid_utf8(tmp_path, read_options, replace):
    (tmp_path / "x.txt").write_bytes(b"fine\xfe")
    with pytest.raises(DataError, match=r"x\.txt is not UTF-8 at byte 4 \(0xfe\); --invalid_utf8 replace"):
        texts(tmp_path, read_options)
    assert texts(tmp_path, replace) == ["fine\ufffd"]
    with pytest.raises(DataError, match=r"x\.txt, after document 0, is not UTF-8"):
        texts(tmp_path, dataclasses.replace(read_options, document_separator="|"))
    assert texts(tmp_path, dataclasses.replace(replace, document_separator="|")) == ["fine\ufffd"]


def test_dangling_link(tmp_path, read_options):
    (tmp_path / "x.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"x\.txt cannot be read: No such file"):
        texts(tmp_path, read_options)


def test_python_stdlib(read_options):
    source = parse_source("python-stdlib", dataclasses.replace(read_options, document_separator="\n"))
    names = [str(path) for path in source.readers]
    assert source.num_documents == len(names) > 400  # the separator is for text files
    assert json.__file__ in names
    assert not [name for name in names if "site-packages" in name or "/test/" in name]
    assert names == [str(path) for path in parse_source("python-stdlib", read_options).readers]
    assert next(source.documents()).text.startswith(("import", '"""', "#", "'''", "from", "r'''"))


def test_hugging_face_datasets(tmp_path, read_options):
    """A folder that `datasets` reads by itself: the same way through the library as a data set of the hub."""
    folder = tmp_path / "set"
    folder.mkdir()
    for split, values in {"train": ["one", "zwei €"], "test": ["three"]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"body": value}) + "\n" for value in values))
    options = dataclasses.replace(read_options, field="body")
    assert texts(f"hf:{folder}", options) == ["one", "zwei €"]
    assert texts(f"hf:{folder}::test", options) == ["three"]
    with pytest.raises(DataError, match=r"row 1, has no field 'text' \(it has: body\)"):
        texts(f"hf:{folder}", read_options)
    with pytest.raises(DataError, match="split validation, after row 0, cannot be read"):
        texts(f"hf:{folder}::validation", options)
    with pytest.raises(DataError, match="cannot be read"):
        texts(f"hf:{tmp_path / 'gone'}", options)


def test_hugging_face_datasets_absent(read_options, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # import then fails
    with pytest.raises(DataError, match="needs the package `datasets`: pip install datasets"):
        texts("hf:some/name", read_options)
