"""Parquet tables, with the text in one column or in a field of a column of structs."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

from rat_jax.data import DataError
from rat_jax.data.document import Document, FileReader, listed, printable
from rat_jax.data.utf8_file import compression, decode

_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")


@dataclasses.dataclass(frozen=True)
class ParquetReader(FileReader):
    """Parquet files."""

    kind = "Parquet file"

    def check(self, path: pathlib.Path) -> None:
        if self.options.read_record is None:
            self._open(path)
        else:
            super().check(path)

    def num_documents(self, path: pathlib.Path) -> int | None:
        return self._open_file(path).metadata.num_rows

    def documents(self, path: pathlib.Path) -> Iterator[Document]:
        if self.options.read_record is not None:
            yield from self._records(path, self.options.read_record)
            return
        import pyarrow
        import pyarrow.compute

        file, (column, *fields) = self._open(path)
        row = 0
        try:
            for batch in file.iter_batches(batch_size=256, columns=[self.options.field]):
                values = batch.column(column)
                if fields:
                    values = pyarrow.compute.struct_field(values, fields)
                # As bytes, so that invalid UTF-8 is met here, with the row's number at hand.
                for value in values.cast(pyarrow.large_binary()).to_pylist():
                    row += 1
                    name = f"{path}, row {row}"
                    yield Document(name, "" if value is None else decode(value, name, self.options.invalid_utf8))
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}, after row {row}, cannot be read: {printable(error)}") from None

    def _records(self, path: pathlib.Path, read_record: Callable[[object, str], str]) -> Iterator[Document]:
        """The text that each row as a whole makes."""
        import pyarrow

        file, row = self._open_file(path), 0
        try:
            for batch in file.iter_batches(batch_size=16):  # of long documents
                for record in batch.to_pylist():
                    row += 1
                    name = f"{path}, row {row}"
                    yield Document(name, read_record(record, name))
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}, after row {row}, cannot be read: {printable(error)}") from None

    def _open_file(self, path: pathlib.Path):
        import pyarrow
        import pyarrow.parquet

        if compression(path):
            raise DataError(f"{path} cannot be read: Parquet is compressed inside; unpack the file")
        try:
            file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)  # where there are any
            _ = file.schema_arrow  # which may be damaged alone
            return file
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not a Parquet file that can be read: {printable(error)}") from None

    def _open(self, path: pathlib.Path):
        """The file, and the names that lead to the text: of a column, then of fields of structs."""
        import pyarrow

        file = self._open_file(path)
        schema, name = file.schema_arrow, self.options.field
        names = [name] if name in schema.names else name.split(".")
        type_ = pyarrow.struct(list(schema))
        for key in names:
            there = [field.name for field in type_] if pyarrow.types.is_struct(type_) else []
            if key not in there:
                columns = listed(there) if there else f"a column of type {type_}"
                raise DataError(f"{path} has no column {name!r} (it has: {columns}); name one with --field")
            type_ = type_[key].type
        if str(type_.value_type if pyarrow.types.is_dictionary(type_) else type_) not in _TEXT_TYPES:
            raise DataError(f"{path}: column {name!r} must hold text, it is of type {type_}")
        return file, names
