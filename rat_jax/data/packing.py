"""Which examples share a row."""

from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of at most `capacity` tokens by best fit decreasing.

    From the longest example to the shortest, of equal ones the first comes first: each goes into the fullest row that
    has room for it, of equal ones the latest, or else into a new one. At most 11/9 of the fewest rows possible, plus
    one, are needed (Johnson 1973).

    Args:
      lengths: tokens of each example, between 1 and `capacity`.
      capacity: tokens of a row.

    Returns:
      The examples of each row, in order; rows in the order of their first examples, so that neighbouring rows do not
      have examples of similar length.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # rows by the tokens that they have room for
    rooms = 0  # those with a row, as bits: the lowest one from a length on is found in a few steps
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fitting = rooms >> lengths[index]
        if fitting:
            room = lengths[index] + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        room -= lengths[index]
        with_room.setdefault(room, []).append(row)
        rooms |= 1 << room
    return sorted(sorted(row) for row in rows)
