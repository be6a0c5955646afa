"""What CONTRIBUTING.md says of the structure: the table below is the plan of the code, which has no other arrows."""

import ast
import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TESTS = ROOT / "tests"
RULES = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())

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
    "rat_jax.cluster": {"rat_jax.errors", "rat_jax.interrupts", "rat_jax.program"},
    "rat_jax.memory": set(),
    "rat_jax.chips": set(),
    "rat_jax.compilation_cache": {"rat_jax.files", "rat_jax.paths"},
    "rat_jax.stopwatch": set(),
    "rat_jax.parameters": set(),
    "rat_jax.mesh": {"rat_jax.shapes"},
    "rat_jax.segments": {"rat_jax.shapes"},
    "rat_jax.ops": {"pallas_kernels", "rat_jax.errors", "rat_jax.mesh", "rat_jax.segments", "rat_jax.shapes"},
    "rat_jax.layer_loop": {"rat_jax.mesh"},
    "rat_jax.layers": {"rat_jax.mesh", "rat_jax.ops", "rat_jax.shapes"},
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
    "rat_jax.data_config": {"rat_jax.errors"},
    "rat_jax.evaluation_config": {"rat_jax.errors"},
    "rat_jax.config": {
        "rat_jax.data_config",
        "rat_jax.errors",
        "rat_jax.evaluation_config",
        "rat_jax.fields",
        "rat_jax.mixers",
        "rat_jax.paths",
    },
    "rat_jax.config_file": {"rat_jax.config", "rat_jax.errors", "rat_jax.paths"},
    "rat_jax.flops": {"rat_jax.chips", "rat_jax.config"},
    "rat_jax.blocks": {
        "rat_jax.config",
        "rat_jax.layers",
        "rat_jax.mesh",
        "rat_jax.mixers",
        "rat_jax.ops",
        "rat_jax.parameters",
        "rat_jax.segments",
        "rat_jax.shapes",
    },
    "rat_jax.decoder": {
        "rat_jax.blocks",
        "rat_jax.memory",
        "rat_jax.mixers",
        "rat_jax.ops",
        "rat_jax.segments",
        "rat_jax.shapes",
    },
    "rat_jax.model": {
        "rat_jax.blocks",
        "rat_jax.config",
        "rat_jax.decoder",
        "rat_jax.layer_loop",
        "rat_jax.layers",
        "rat_jax.memory",
        "rat_jax.mixers",
        "rat_jax.ops",
        "rat_jax.parameters",
        "rat_jax.segments",
        "rat_jax.shapes",
    },
    "rat_jax.loss": {"rat_jax.mesh", "rat_jax.ops", "rat_jax.shapes"},
    "rat_jax.sharding": {"rat_jax.config", "rat_jax.errors", "rat_jax.mesh", "rat_jax.model"},
    "rat_jax.data": {
        "rat_jax.data_config",
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
        "rat_jax.data_config",
        "rat_jax.errors",
        "rat_jax.files",
        "rat_jax.mixers",
        "rat_jax.model",
        "rat_jax.paths",
        "rat_jax.program",
    },
    "rat_jax.mesh_flag": {
        "rat_jax.checkpoints",
        "rat_jax.config",
        "rat_jax.errors",
        "rat_jax.memory",
        "rat_jax.mesh",
        "rat_jax.program",
        "rat_jax.sharding",
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
        "rat_jax.cluster",
        "rat_jax.checkpoints",
        "rat_jax.chips",
        "rat_jax.config",
        "rat_jax.data",
        "rat_jax.data_config",
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


def test_the_prose_of_arrows_is_the_table():
    prose = re.search(
        r"Imports go one way: entry scripts → (.*?) → jax\. Beside them (.*?) import none of these", RULES
    )
    chain, beside = prose.groups()
    tiers = [{*re.split(r", | and ", beside)}, *({*tier.split(", ")} for tier in reversed(chain.split(" → ")))]
    height = {name: place for place, tier in enumerate(tiers) for name in tier}
    assert len(height) == sum(map(len, tiers)), "a name stands twice"
    table = {
        room.removeprefix("rat_jax."): {target.removeprefix("rat_jax.") for target in targets}
        for room, targets in ARROWS.items()
    }
    assert set(height) == set(table)
    for room, targets in table.items():
        lower = {name for name in table if height[name] < height[room]} | (tiers[0] if room in tiers[0] else set())
        assert targets <= lower, f"{room} imports {targets - lower}, which CONTRIBUTING.md has not below it"


def catches_anything(tree: ast.Module) -> bool:
    """Whether exceptions of any sort are caught, other than by a handler that ends in raising them again."""
    broad = ("Exception", "BaseException")
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            if not again and any(kind is None or ast.unparse(kind) in broad for kind in kinds):
                return True
        is_suppress = isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "suppress"
        if is_suppress and any(ast.unparse(kind) in broad for kind in node.args):
            return True
    return False


def test_any_exception_is_caught_only_where_the_rules_say():
    found = {
        str(file.relative_to(ROOT))
        for pattern in ("*.py", "rat_jax/**/*.py", "pallas_kernels/**/*.py")
        for file in ROOT.glob(pattern)
        if catches_anything(ast.parse(file.read_text()))
    }
    (sentence,) = re.findall(r"Handlers name their exceptions\.(.*?)\* ", RULES)
    assert found == set(re.findall(r"`([\w/]+\.py)", sentence))


@pytest.mark.parametrize(
    ("code", "anything"),
    [
        ("try: f()\nexcept: g()", True),
        ("try: f()\nexcept (ValueError, Exception): raise OSError", True),
        ("with contextlib.suppress(Exception): f()", True),
        ("try: f()\nexcept BaseException:\n  g()\n  raise", False),
        ("try: f()\nexcept OSError: g()", False),
    ],
)
def test_what_catches_anything_is_found(code, anything):
    assert catches_anything(ast.parse(code)) == anything


TEST_FILES = sorted(file for file in TESTS.rglob("test_*.py") if file.parent not in (TESTS, TESTS / "faults"))


def room_of_tests(file: pathlib.Path) -> str:
    """The folder of code that a file of tests lies in by its place, as the start of a module's name."""
    parts = file.parent.relative_to(TESTS).parts
    return ".".join(parts if (ROOT / pathlib.Path(*parts)).is_dir() else ("rat_jax", *parts))


def mentions(file: pathlib.Path, room: str, seen: set[pathlib.Path]) -> bool:
    """Whether a file names modules of a room, or a helper of the tests or an entry script does that it names."""
    seen.add(file)
    text = file.read_text()
    if re.search(rf"\b{re.escape(room)}\b", text):
        return True
    named = [name.replace(".", "/") + ".py" for name in re.findall(r"\btests(?:\.\w+)+", text)]
    named += [f"tests/{name}.py" for name in re.findall(r"^from tests import (\w+)$", text, re.MULTILINE)]
    named += re.findall(r"\b(?:train|eval|generate)\.py\b", text)
    return any(
        mentions(ROOT / name, room, seen) for name in named if (ROOT / name).is_file() and ROOT / name not in seen
    )


@pytest.mark.parametrize("file", TEST_FILES, ids=lambda file: str(file.relative_to(TESTS)))
def test_a_test_lies_in_the_folder_of_its_subject(file):
    room = room_of_tests(file)
    assert (ROOT / room.replace(".", "/")).is_dir(), f"there is no folder {room} that {file} could be of"
    assert mentions(file, room, set()), f"{file} has nothing to do with {room}"


def test_every_room_that_is_a_folder_has_its_folder_of_tests():
    folders = {room.removeprefix("rat_jax.") for room in ARROWS if (ROOT / room.replace(".", "/")).is_dir()}
    assert {name for name in folders if not any((TESTS / name).glob("**/test_*.py"))} == set()
