"""What a corpus of examples says of its rows."""

import dataclasses
from typing import Any, Literal, get_args

from rat_jax.data.json_object import build, require

RowKind = Literal["packed", "padded"]
ROW_KINDS: tuple[RowKind, ...] = get_args(RowKind)


@dataclasses.dataclass(frozen=True)
class RowFigures:
    """Counts of a split."""

    num_rows: int
    num_examples: int  # a prompt with each of its answers is one
    num_tokens: int  # of examples, without padding
    num_answer_tokens: int  # that are learned, the ends of answers among them
    num_cut: int  # examples whose prompt lost its middle
    num_left_out: int  # examples whose answer alone fills a row; not counted above

    def efficiency(self, seq_len: int) -> float:
        """The part of the rows that is no padding."""
        return self.num_tokens / (self.num_rows * seq_len)


@dataclasses.dataclass(frozen=True)
class Examples:
    """The form of all rows, and the counts of each split."""

    seq_len: int  # tokens of a row
    rows: str  # `RowKind`
    chat_template_hash: str | None  # `ChatTemplate.hash`; None: there is no template
    splits: dict[str, RowFigures]

    @classmethod
    def of(cls, values: dict[str, Any], name: str) -> "Examples":
        """From what `dataclasses.asdict` gave.

        Raises:
          DataError: if it is damaged.
        """
        fields = build(_Fields, values, name)
        require(fields.rows in ROW_KINDS, name, f"rows is {fields.rows[:80]!r}")
        splits = {split: build(RowFigures, counts, f"{name}, {split}") for split, counts in fields.splits.items()}
        for split, counts in splits.items():
            places = counts.num_rows * fields.seq_len
            is_possible = 1 <= counts.num_rows <= counts.num_examples <= counts.num_tokens <= places
            require(is_possible, f"{name}, {split}", "its counts contradict each other")
        return cls(fields.seq_len, fields.rows, fields.chat_template_hash, splits)

    def num_steps(self, global_batch_size: int) -> int:
        """Steps of an epoch: batches that hold every training row once, and of the last one the first of the next."""
        return -(-self.splits["train"].num_rows // global_batch_size)


@dataclasses.dataclass(frozen=True)
class _Fields:
    seq_len: int
    rows: str
    chat_template_hash: str | None
    splits: dict[str, Any]
