import dataclasses
import gzip
import json

import pytest

from rat_jax.data import DataError
from rat_jax.data.sources import parse_source


def texts(spec, options):
    return [document.text for document in parse_source(str(spec), options).documents()]


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
        (b"[" * 100_000, "line 2 is JSON that cannot be read: it is nested too deeply"),
        (b'{"text": ' + b"1" * 5000 + b"}", "line 2 is JSON that cannot be read: Exceeds the limit"),
    ],
)
def test_json_lines_that_cannot_be_read(tmp_path, read_options, line, message):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "fine"}\n' + line)
    with pytest.raises(DataError, match=message):
        texts(tmp_path / "x.jsonl", read_options)


RECORDS = [{"text": "one [{", "id": 1}, {"text": "zwei \u20ac\n", "id": [2, {}]}, {"id": None, "text": "3" * 50}]


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    "content",
    [
        "\n".join(map(json.dumps, RECORDS)),
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=2, ensure_ascii=False) + "\n",
        "\n\n".join(json.dumps(record, indent=1) for record in RECORDS),
    ],
    ids=["lines", "array", "indented array", "indented objects"],
)
def test_json_files(tmp_path, read_options, monkeypatch, content, block):
    """However the values lie in the blocks that are read."""
    monkeypatch.setattr("rat_jax.data.json_files._BLOCK_CHARACTERS", block)
    (tmp_path / "x.json").write_text(content)
    for spec in (tmp_path, tmp_path / "x.json", f"jsonl:{tmp_path}"):
        assert texts(spec, read_options) == [record["text"] for record in RECORDS]


def test_empty_json_files(tmp_path, read_options):
    for content in ("", " \n", "[]", " [ ]\n"):
        (tmp_path / "x.json").write_text(content)
        assert texts(tmp_path, read_options) == []


@pytest.mark.parametrize("block", [1, 1 << 20])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{\n"name": "x"}',
            r"x\.json, line 1 has no field 'text' \(it has: name\); name the text with --field; text:PATH reads",
        ),
        ('["one"]', r"x\.json, line 1 holds a string; .* text:PATH reads any file as plain text"),
        ('[\n\n[{"text": "x"}]]', "line 3 holds an array in an array"),
        ("3.5", "line 1 holds a number"),
        ('[{"text": "x"},\n{"text": "y"}', "ends inside its array of objects: it was cut short"),
        ('[{"text": "x"}\n{"text": "y"}]', "line 2 is not JSON: an array goes on with a comma or ends with ]"),
        ('[{"text": "x"},]', "line 1 is not JSON: Expecting value"),
        ('[{"text": "x"}] {}', "line 1 is not JSON: text follows the end of the array"),
        ('{"text": "x"}\n{"text": y} and many more words', "line 2 is not JSON: Expecting value"),
        ('{"text": "x"}\n{"text":\n"x', "line 3 is not JSON: Unterminated string"),
        ("plain text", "line 1 is not JSON: Expecting value; text:PATH reads any file as plain text"),
        ("[" + '{"a":' * 100_000, "line 1 is JSON that cannot be read: it is nested too deeply"),
    ],
)
def test_json_files_that_cannot_be_read(tmp_path, read_options, monkeypatch, content, message, block):
    monkeypatch.setattr("rat_jax.data.json_files._BLOCK_CHARACTERS", block)
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=message):
        texts(tmp_path / "x.json", read_options)
    assert texts(f"text:{tmp_path}", read_options) == [content]


def test_nested_field(tmp_path, read_options):
    """A key of the whole name comes first; an object that is null has no text."""
    records = [{"meta": {"text": "one"}}, {"meta": {"text": "x"}, "meta.text": "two"}, {"meta": None}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, records)))
    options = dataclasses.replace(read_options, field="meta.text")
    assert texts(tmp_path, options) == ["one", "two", ""]
    for record, message in (({"meta": "x"}, r"no field 'meta\.text' \(it has: a str\)"), ({"a": 1}, "it has: a")):
        (tmp_path / "x.jsonl").write_text(json.dumps(record))
        with pytest.raises(DataError, match=message):
            texts(tmp_path, options)


def test_names_of_fields_in_messages(tmp_path, read_options):
    """In one line that can be printed, however many, long and strange they are."""
    (tmp_path / "x.jsonl").write_text(
        json.dumps({"a\nb": 1, "\ud800": 2, "c" * 1000: 3} | dict.fromkeys(map(str, range(50))))
    )
    with pytest.raises(DataError) as failure:
        texts(tmp_path, read_options)
    said = str(failure.value).removeprefix(str(tmp_path))
    assert "it has: a b, \\ud800, cccc" in said and "and 41 more" in said
    assert said.isprintable() and said.isascii() and len(said) < 300
