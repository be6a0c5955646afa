"""A table of a page: a caption, the heads of columns, and rows that each have a head."""

import dataclasses
from typing import Literal

from rat_jax.report.amounts import ABSENT


@dataclasses.dataclass(frozen=True)
class Head:
    """Of a row or of a column."""

    text: str
    run: int | None = None  # whose colour stands before it
    detail: str = ""  # in smaller letters
    is_text: bool = False  # of a column: its cells are words, not figures


@dataclasses.dataclass(frozen=True)
class Cell:
    """What stands in a row under a column."""

    text: str
    strong: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """The cells under all columns but the first."""

    head: Head
    cells: tuple[Cell, ...]
    kind: Literal["value", "setting"] = "value"


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under the heads of columns, the first of which is that of the rows' heads."""

    caption: str
    columns: tuple[Head, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        for row in self.rows:
            if len(row.cells) != len(self.columns) - 1:
                raise ValueError(f"row {row.head.text!r} has {len(row.cells)} cells under {len(self.columns)} columns")


def without_empty_columns(table: Table) -> Table:
    """Leaves out columns that have nothing in any row."""
    kept = [
        place for place in range(len(table.columns) - 1) if any(row.cells[place].text != ABSENT for row in table.rows)
    ]
    columns = (table.columns[0], *(table.columns[place + 1] for place in kept))
    rows = (dataclasses.replace(row, cells=tuple(row.cells[place] for place in kept)) for row in table.rows)
    return dataclasses.replace(table, columns=columns, rows=tuple(rows))


def texts(*values: str) -> tuple[Cell, ...]:
    """Cells of plain text."""
    return tuple(map(Cell, values))
