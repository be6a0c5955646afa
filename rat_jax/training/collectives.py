"""What devices exchange in a compiled program, by kind of collective."""

import dataclasses
import math
import re
from collections.abc import Callable

from rat_jax.training.hlo import Instruction, Program

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
_FUSED_SCATTER = "all-reduce-scatter"  # the TPU compiler's name of a fusion of an all-reduce and a slice of its result
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{('[^}]*)\}")
_MESH_AXIS = re.compile(r"'([^']+)'(?::\(\d+\)(\d+))?")  # a part of an axis is 'name':(parts before)parts
_IOTA_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")


@dataclasses.dataclass(frozen=True)
class Collectives:
    """All collectives of one kind in a program."""

    count: int  # executed by each device in a run of the program
    num_bytes: int  # of whole arrays: gathered, before they are reduced or scattered, permuted
    sent_bytes: int  # that each device sends, where groups are rings: see `sent`
    looped: int  # of `count`, those counted for one turn of a loop whose turns are not known


def count_collectives(
    program: Program, num_devices: int, counts: Callable[[Instruction], bool] = lambda instruction: True
) -> dict[str, Collectives]:
    """The collectives of each kind that a program has.

    Those with a start and a done are one each, and so are those that the TPU compiler cuts up to overlap them with
    other work. What is inside a loop counts as often as the loop turns.

    Args:
      program: for one device.
      num_devices: that it is for, the size of groups that the text leaves out.
      counts: whether a collective is counted.
    """
    found = {kind: Collectives(0, 0, 0, 0) for kind in KINDS}
    pieces = set()
    for instruction, times, is_part in program.executed():
        kind = _kind(instruction)
        if kind is None or not counts(instruction):
            continue
        piece = _piece(instruction)
        if piece is not None and piece in pieces:
            continue
        pieces.add(piece)
        devices = _group_size(instruction, num_devices)
        whole = program.bytes_of_operands(instruction) * (devices if kind == "all-gather" else 1)
        so_far = found[kind]
        found[kind] = Collectives(
            so_far.count + times,
            so_far.num_bytes + times * whole,
            so_far.sent_bytes + times * sent(kind, whole, devices),
            so_far.looped + times * is_part,
        )
    return {kind: part for kind, part in found.items() if part.count}


def sent(kind: str, num_bytes: int, num_devices: int) -> int:
    """Bytes that each device of a ring sends.

    With b bytes of whole arrays and n devices: all-gather, reduce-scatter and all-to-all b (n - 1) / n; all-reduce,
    which is one of each of the first two, twice that; collective-permute b.
    """
    if kind == "collective-permute":
        return num_bytes
    return num_bytes * (num_devices - 1) // num_devices * (2 if kind == "all-reduce" else 1)


def _kind(instruction: Instruction) -> str | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind == "all-reduce" and instruction.computation.startswith(_FUSED_SCATTER):
        return "reduce-scatter"
    return kind if kind in KINDS else None


def _piece(instruction: Instruction) -> tuple[str | None, ...] | None:
    """What the pieces of one collective that is cut up have in common; None: it is whole."""
    chain = re.search(r'\bchain_id="(\d+)"', instruction.text)
    return None if chain is None else (instruction.opcode, instruction.attribute("channel_id"), chain[1])


def _group_size(instruction: Instruction, num_devices: int) -> int:
    """Devices that exchange with each other.

    Raises:
      ValueError: if the text says it in a form that is not known.
    """
    text = instruction.text
    if found := _MESH_GROUPS.search(text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        return math.prod(int(part or sizes[name]) for name, part in _MESH_AXIS.findall(found[2]))
    if found := _IOTA_GROUPS.search(text) or _LISTED_GROUPS.search(text):
        return int(found[1]) if found.re is _IOTA_GROUPS else found[1].count(",") + 1
    if "replica_groups=" in text and "replica_groups={}" not in text:
        raise ValueError(f"{instruction.name} has groups of devices in an unknown form: {text[:200]}")
    return num_devices
