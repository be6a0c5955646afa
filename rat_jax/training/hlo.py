"""The text of a compiled program: its instructions, and how often each of them runs."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_BITS = {"pred": 8, "token": 0}  # of types whose names do not end in their width
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_OPCODE = re.compile(r"\s([a-z][a-z0-9-]*)\(")
_NAME = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_KNOWN_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    text: str  # behind the operands: attributes; of a constant or parameter its value, too
    computation: str

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs, but for loops."""
        branches = _BRANCHES.search(self.text)
        return (*_CALLED.findall(self.text), *(_NAME.findall(branches[1]) if branches else ()))

    def attribute(self, name: str) -> str | None:
        """What stands behind `name=`, up to the next comma or space."""
        found = re.search(rf"\b{name}=%?([^\s,]+)", self.text)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a program, each a table of its instructions by name."""

    computations: Mapping[str, Mapping[str, Instruction]]
    roots: Mapping[str, str]  # names of the instructions that computations return
    entry: str

    @classmethod
    def parse(cls, text: str) -> "Program":
        """Reads what `jax.stages.Compiled.as_text` gives.

        Raises:
          ValueError: if no computation is marked as the entry.
        """
        computations, roots, entry, current = {}, {}, None, None
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                current = head[1]
                computations[current] = {}
                entry = current if line.startswith("ENTRY ") else entry
            elif current is not None and (found := _INSTRUCTION.match(line)):
                instruction = _instruction(found[1], found[2], current)
                computations[current][instruction.name] = instruction
                if line.lstrip().startswith("ROOT "):
                    roots[current] = instruction.name
        if entry is None:
            raise ValueError("the text has no ENTRY computation, so it is none of a compiled program")
        return cls(computations, roots, entry)

    def executed(self) -> Iterator[tuple[Instruction, int, bool]]:
        """Instructions with the times that each runs, and whether a loop of unknown turns is counted as one turn.

        Those of fusions and other called computations included; of branches all, as if each were taken.
        """
        yield from self._executed(self.entry, 1, False)

    def bytes_of_operands(self, instruction: Instruction) -> int:
        """Bytes of the arrays that an instruction takes."""
        table = self.computations[instruction.computation]
        return sum(num_bytes(table[name].type) for name in instruction.operands if name in table)

    def axes_of_operands(self, instruction: Instruction) -> set[int]:
        """How many axes the arrays have that an instruction takes."""
        table = self.computations[instruction.computation]
        return set().union(*(num_axes(table[name].type) for name in instruction.operands if name in table))

    def turns(self, loop: Instruction) -> int | None:
        """How often the body of a `while` runs; None if that is not known.

        It stands in the text, or the condition compares a counter with a constant, and the body adds one to it.
        """
        if known := _KNOWN_TURNS.search(loop.text):
            return int(known[1])
        condition, body = loop.attribute("condition"), loop.attribute("body")
        test = self._origin(condition, self.roots[condition])
        if test.opcode != "compare" or test.attribute("direction") != "LT":
            return None
        counter, limit = (self._origin(condition, name) for name in test.operands)
        end = _constant(limit)
        if end is None or counter.opcode != "get-tuple-element":
            return None
        index = int(counter.attribute("index"))
        start = self._element(loop.computation, loop.operands[0], index)
        next_one = self._element(body, self.roots[body], index)
        if start is None or next_one is None or next_one.opcode != "add":
            return None
        terms = [self._origin(body, name) for name in next_one.operands]
        steps = [value for value in map(_constant, terms) if value is not None]
        counts = [x for x in terms if x.opcode == "get-tuple-element" and x.attribute("index") == str(index)]
        first = _constant(start)
        if first is None or len(counts) != 1 or len(steps) != 1 or steps[0] < 1:
            return None
        return max(0, math.ceil((end - first) / steps[0]))

    def _executed(self, computation: str, times: int, is_part: bool) -> Iterator[tuple[Instruction, int, bool]]:
        for instruction in self.computations[computation].values():
            yield instruction, times, is_part
            if instruction.opcode == "while":
                turns = self.turns(instruction)
                body = instruction.attribute("body")
                yield from self._executed(body, times * (1 if turns is None else turns), is_part or turns is None)
            elif not instruction.opcode.endswith(("-update", "-done")):  # of what a `-start` runs
                for called in instruction.called:
                    yield from self._executed(called, times, is_part)

    def _origin(self, computation: str, name: str) -> Instruction:
        """The instruction whose value a name has, before it was copied."""
        instruction = self.computations[computation][name]
        while instruction.opcode in ("copy", "bitcast", "convert") and instruction.operands:
            instruction = self.computations[computation][instruction.operands[0]]
        return instruction

    def _element(self, computation: str, name: str, index: int) -> Instruction | None:
        """Element `index` of a tuple."""
        instruction = self._origin(computation, name)
        if instruction.opcode != "tuple":
            return None
        return self._origin(computation, instruction.operands[index])


def num_bytes(type_text: str) -> int:
    """Bytes of all arrays that a type names."""
    return sum(_bits(kind) * _size(dims) for kind, dims, _ in _ARRAY.findall(type_text)) // 8


def num_axes(type_text: str) -> set[int]:
    """How many axes the arrays have that a type names."""
    return {len(dims.split(",")) if dims else 0 for _, dims, _ in _ARRAY.findall(type_text)}


def _bits(kind: str) -> int:
    if kind in _BITS:
        return _BITS[kind]
    return int(re.search(r"\d+", kind)[0])  # f8e4m3fn, bf16, s4, c64


def _size(dims: str) -> int:
    return math.prod(int(size.lstrip("<=")) for size in dims.split(",") if size)


def _instruction(name: str, rest: str, computation: str) -> Instruction:
    opcode = _OPCODE.search(rest)
    start = opcode.end()
    end = _closing(rest, start)
    inside = rest[start:end]
    names = _NAME.findall(inside)
    behind = rest[end + 1 :]
    value = f"({inside})" if opcode[1] in ("constant", "parameter") else ""
    return Instruction(name, rest[: opcode.start()], opcode[1], tuple(names), value + behind, computation)


def _closing(text: str, start: int) -> int:
    """The place of the bracket that closes the one before `start`."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"no bracket closes {text[:start][-80:]!r}")


def _constant(instruction: Instruction) -> int | None:
    found = re.match(r"\((-?\d+)\)", instruction.text) if instruction.opcode == "constant" else None
    return int(found[1]) if found else None
