import dataclasses
import json
import sys

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
