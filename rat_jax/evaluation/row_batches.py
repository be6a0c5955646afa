"""Texts that are scored together: which share a batch, and which a row, in few shapes with little padding."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rat_jax.data.packing import best_fit
from rat_jax.evaluation.padding import padded_count, padded_length
from rat_jax.shapes import Array, Int

PACKED_LENGTH = 1024  # tokens of a row that holds several texts; each has half of them at most


class RowBatch(NamedTuple):
    """Rows of one length; padding follows the texts of a row, which do not see it or each other."""

    tokens: Int[Array, "B T"] | np.ndarray
    targets: Int[Array, "B T"] | np.ndarray  # the token after each
    segment_ids: Int[Array, "B T"] | np.ndarray | None  # None: each row is one text


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """Which texts are computed together, and the shape they are padded to."""

    rows: list[list[int]]  # texts of each row, one after the other
    num_rows: int  # padding included
    length: int
    packed: bool  # whether rows may hold several texts

    @property
    def num_tokens(self) -> int:
        """Tokens that are read, padding included."""
        return self.num_rows * self.length

    def batch(self, texts: Sequence[np.ndarray]) -> RowBatch:
        """The arrays; the last token of each text is only predicted."""
        tokens, targets, segment_ids = (np.zeros((self.num_rows, self.length), np.int32) for _ in range(3))
        for row, members in enumerate(self.rows):
            start = 0
            for number, index in enumerate(members, start=1):
                ids = texts[index]
                end = start + len(ids) - 1
                tokens[row, start:end] = ids[:-1]
                targets[row, start:end] = ids[1:]
                segment_ids[row, start:end] = number
                start = end
        return RowBatch(tokens, targets, segment_ids if self.packed else None)


def plan_batches(
    lengths: Sequence[int], context_length: int, batch_tokens: int, num_devices: int
) -> list[PlannedBatch]:
    """Texts in batches of few shapes: one a row, or short ones in packed rows where fewer tokens are read that way.

    Texts with a row each are sorted, the longest first. A batch is as long as its longest, rounded up to a multiple of
    an eighth of the next power of two. Rows of PACKED_LENGTH hold texts of at most half of it by best fit. A batch has
    as many rows as `batch_tokens` hold; the last one of a kind has fewer, a power of two for each device.

    Args:
      lengths: tokens to read of each text.
      context_length: no text is longer.
      batch_tokens: of a batch, padding included; exceeded where one row for each device is more.
      num_devices: what the rows of a batch are a multiple of.
    """
    numbers = list(range(len(lengths)))
    apart = _plan_apart(numbers, lengths, context_length, batch_tokens, num_devices)
    if batch_tokens < PACKED_LENGTH * num_devices:
        return apart
    short = [number for number in numbers if lengths[number] <= PACKED_LENGTH // 2]
    long = [number for number in numbers if lengths[number] > PACKED_LENGTH // 2]
    packed = [
        *_plan_apart(long, lengths, context_length, batch_tokens, num_devices),
        *_plan_packed(short, lengths, batch_tokens, num_devices),
    ]
    return min(apart, packed, key=lambda plan: sum(planned.num_tokens for planned in plan))


def _plan_apart(
    numbers: Sequence[int], lengths: Sequence[int], context_length: int, batch_tokens: int, num_devices: int
) -> list[PlannedBatch]:
    order = sorted(numbers, key=lambda number: -lengths[number])
    plan, start = [], 0
    while start < len(order):
        length = padded_length(lengths[order[start]], context_length)
        per_device = max(1, batch_tokens // (length * num_devices))
        rows = [[number] for number in order[start : start + per_device * num_devices]]
        plan.append(PlannedBatch(rows, _num_rows(len(rows), per_device, num_devices), length, packed=False))
        start += len(rows)
    return plan


def _plan_packed(
    numbers: Sequence[int], lengths: Sequence[int], batch_tokens: int, num_devices: int
) -> list[PlannedBatch]:
    rows = [
        [numbers[member] for member in members]
        for members in best_fit([lengths[number] for number in numbers], PACKED_LENGTH)
    ]
    per_device = batch_tokens // (PACKED_LENGTH * num_devices)
    plan = []
    for start in range(0, len(rows), per_device * num_devices):
        part = rows[start : start + per_device * num_devices]
        plan.append(PlannedBatch(part, _num_rows(len(part), per_device, num_devices), PACKED_LENGTH, packed=True))
    return plan


def _num_rows(count: int, most_per_device: int, num_devices: int) -> int:
    return padded_count(-(-count // num_devices), most_per_device) * num_devices
