import dataclasses

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


@pytest.mark.parametrize(
    "type_",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.binary(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string()),
    ],
)
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
    (tmp_path / "x.parquet").rename(tmp_path / "x.parquet.gz")
    with pytest.raises(DataError, match=r"x\.parquet\.gz cannot be read: Parquet is compressed inside; unpack"):
        texts(tmp_path, read_options)


def test_nested_field(tmp_path, read_options):
    """A column of the whole name comes first; a struct that is null has no text."""
    column = [{"a": {"text": "one"}, "n": 1}, {"a": None, "n": 2}, None, {"a": {"text": "zwei"}, "n": 3}]
    pyarrow.parquet.write_table(pyarrow.table({"meta": column, "a.text": list("wxyz")}), tmp_path / "x.parquet")
    for field, expected in (("meta.a.text", ["one", "", "", "zwei"]), ("a.text", list("wxyz"))):
        assert texts(tmp_path, dataclasses.replace(read_options, field=field)) == expected
    for field, message in (("meta.b", "it has: a, n"), ("meta", "must hold text"), ("meta.n.text", "of type int64")):
        source = parse_source(str(tmp_path), dataclasses.replace(read_options, field=field))
        with pytest.raises(DataError, match=message):
            source.check()


def test_column_of_nulls(tmp_path, read_options):
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.nulls(2)}), tmp_path / "x.parquet")
    assert texts(tmp_path, read_options) == ["", ""]
