"""Imports go one way: the table below is the plan of the code, and the code has no other arrows."""

import ast
import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Rooms, and the rooms that they may import; what is lower in the table imports what is above it.
ARROWS: dict[str, set[str]] = {
    "pallas_kernels": set(),
    "rat_jax.shapes": set(),
    "rat_jax.errors": set(),
    "rat_jax.fields": {"rat_jax.errors"},
    "rat_jax.files": {"rat_jax.errors"},
    "rat_jax.paths": {"rat_jax.errors"},
    "rat_jax.pictures": {"rat_jax.files"},
    "rat_jax.processes": set(),
    "rat_jax.interrupts": set(),
    "rat_jax.program": {"rat_jax.errors", "rat_jax.files", "rat_jax.interrupts"},
    "rat_jax.memory": set(),
    "rat_jax.compilation_cache": {"rat_jax.files", "rat_jax.paths"},
    "rat_jax.stopwatch": set(),
    "rat_jax.parameters": set(),
    "rat_jax.mesh": {"rat_jax.shapes"},
    "rat_jax.segments": {"rat_jax.shapes"},
    "rat_jax.ops": {"pallas_kernels", "rat_jax.errors", "rat_jax.mesh", "rat_jax.segments", "rat_jax.shapes"},
    "rat_jax.layers": {"rat_jax.ops", "rat_jax.shapes"},
    "rat_jax.mixers": {
        "rat_jax.errors",
        "rat_jax.fields",
        "rat_jax.layers",
        "rat_jax.memory",
        "rat_jax.ops",
        "rat_jax.parameters",
        "rat_jax.segments",
        "rat_jax.shapes",
    },
    "rat_jax.evaluation_config": {"rat_jax.errors"},
    "rat_jax.config": {
        "rat_jax.errors",
        "rat_jax.evaluation_config",
        "rat_jax.fields",
        "rat_jax.mixers",
        "rat_jax.paths",
    },
    "rat_jax.config_file": {"rat_jax.config", "rat_jax.errors", "rat_jax.paths"},
    "rat_jax.flops": {"rat_jax.config"},
    "rat_jax.blocks": {
        "rat_jax.config",
        "rat_jax.layers",
        "rat_jax.mixers",
        "rat_jax.parameters",
        "rat_jax.segments",
        "rat_jax.shapes",
    },
    "rat_jax.decoder": {"rat_jax.memory", "rat_jax.mixers", "rat_jax.segments", "rat_jax.shapes"},
    "rat_jax.model": {
        "rat_jax.blocks",
        "rat_jax.config",
        "rat_jax.decoder",
        "rat_jax.layers",
        "rat_jax.memory",
        "rat_jax.mixers",
        "rat_jax.ops",
        "rat_jax.parameters",
        "rat_jax.segments",
        "rat_jax.shapes",
    },
    "rat_jax.loss": {"rat_jax.mesh", "rat_jax.shapes"},
    "rat_jax.sharding": {"rat_jax.config", "rat_jax.errors", "rat_jax.mesh", "rat_jax.model"},
    "rat_jax.data": {
        "rat_jax.config",
        "rat_jax.errors",
        "rat_jax.fields",
        "rat_jax.files",
        "rat_jax.paths",
        "rat_jax.processes",
        "rat_jax.program",
    },
    "rat_jax.checkpoints": {
        "rat_jax.config",
        "rat_jax.data",
        "rat_jax.errors",
        "rat_jax.fields",
        "rat_jax.files",
        "rat_jax.interrupts",
        "rat_jax.model",
        "rat_jax.paths",
        "rat_jax.processes",
        "rat_jax.program",
        "rat_jax.sharding",
    },
    "rat_jax.release": {
        "rat_jax.checkpoints",
        "rat_jax.config",
        "rat_jax.data",
        "rat_jax.errors",
        "rat_jax.files",
        "rat_jax.mixers",
        "rat_jax.model",
        "rat_jax.paths",
        "rat_jax.program",
    },
    "rat_jax.program_store": {"rat_jax.compilation_cache", "rat_jax.config", "rat_jax.files", "rat_jax.mixers"},
    "rat_jax.sampling": {
        "rat_jax.checkpoints",
        "rat_jax.config",
        "rat_jax.data",
        "rat_jax.decoder",
        "rat_jax.errors",
        "rat_jax.files",
        "rat_jax.memory",
        "rat_jax.mesh",
        "rat_jax.model",
        "rat_jax.ops",
        "rat_jax.paths",
        "rat_jax.program_store",
        "rat_jax.shapes",
    },
    "rat_jax.evaluation": {
        "rat_jax.pictures",
        "rat_jax.blocks",
        "rat_jax.checkpoints",
        "rat_jax.config",
        "rat_jax.data",
        "rat_jax.decoder",
        "rat_jax.errors",
        "rat_jax.evaluation_config",
        "rat_jax.fields",
        "rat_jax.files",
        "rat_jax.loss",
        "rat_jax.memory",
        "rat_jax.mesh",
        "rat_jax.mixers",
        "rat_jax.model",
        "rat_jax.paths",
        "rat_jax.program",
        "rat_jax.sampling",
        "rat_jax.segments",
        "rat_jax.shapes",
        "rat_jax.sharding",
    },
    "rat_jax.report": {
        "rat_jax.checkpoints",
        "rat_jax.config",
        "rat_jax.data",
        "rat_jax.errors",
        "rat_jax.files",
        "rat_jax.flops",
        "rat_jax.paths",
        "rat_jax.program",
    },
    "rat_jax.training": {
        "rat_jax.pictures",
        "rat_jax.checkpoints",
        "rat_jax.config",
        "rat_jax.data",
        "rat_jax.errors",
        "rat_jax.evaluation",
        "rat_jax.files",
        "rat_jax.flops",
        "rat_jax.interrupts",
        "rat_jax.loss",
        "rat_jax.memory",
        "rat_jax.mesh",
        "rat_jax.model",
        "rat_jax.paths",
        "rat_jax.release",
        "rat_jax.shapes",
        "rat_jax.sharding",
    },
}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] != "rat_jax" else ".".join(parts[:2])


def imports(file: pathlib.Path) -> set[str]:
    """Modules of this repository that a file imports, inside functions too; those for type checkers alone are not."""
    found = set()
    tree = ast.parse(file.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            if node.module == "rat_jax":
                found |= {f"rat_jax.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return {
        name for name in found if name.split(".")[0] in ("rat_jax", "pallas_kernels", "configs", "tests", "benchmarks")
    }


@functools.cache
def arrows() -> dict[str, set[str]]:
    drawn: dict[str, set[str]] = {}
    for package in ("rat_jax", "pallas_kernels"):
        for file in (ROOT / package).rglob("*.py"):
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            room = room_of(module.removesuffix(".__init__"))
            drawn.setdefault(room, set()).update({room_of(name) for name in imports(file)} - {room})
    return {room: targets for room, targets in drawn.items() if room != "rat_jax"}


def test_the_table_is_one_way():
    above: set[str] = set()
    for room, targets in ARROWS.items():
        assert targets <= above, f"{room} imports {targets - above}, which is not above it"
        above.add(room)


@pytest.mark.parametrize("room", ARROWS)
def test_imports_are_those_of_the_table(room):
    assert arrows()[room] == ARROWS[room]


def test_every_room_is_in_the_table():
    assert set(arrows()) == set(ARROWS)
