"""Documentation: what it tells a reader to run runs, and what it points at is there."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from flax import nnx

from rat_jax.checkpoints import save_model
from rat_jax.data.tokenizer import ByteTokenizer
from rat_jax.model import LanguageModel
from rat_jax.release.file import ReleaseFile, write_release_file
from tests import documented
from tests.commands import import_path
from tests.documented import PAGES, ROOT
from tests.release.test_weights import recording
from tests.tiny_run import tiny_config

WRONG = {
    "python train.py --config=configs/no_such.py --workdir=runs/x": "configs/no_such.py",
    "python train.py --config=configs/default.py --workdir=runs/x --config.model.widht=8": "widht",
    "python train.py --config=configs/default.py --workdir=runs/x --config.model.width=narrow": "width",
    "python train.py --config=configs/default.py --workdir=runs/x --config.model.num_heads=3": "num_heads",
    "python train.py --config=configs/default.py --workdir=runs/x --resume": "resume",
    "python eval.py --workdir=runs/x --context_length=4096": "context_length",
    "python generate.py --workdir=runs/x": "nothing to continue",
    "python benchmarks/layer_latency.py --query_heads 4": "unrecognized",
    "python benchmarks/no_such.py": "no_such",
    "python -m rat_jax.data.prepare --source texts --tokenizer bytes": "--out",
    "python -m rat_jax.no_such": "no_such",
    "python -m rat_jax.checkpoints exports runs/x weights": "invalid choice",
    "python -m rat_jax.release imports a.pth runs/x": "invalid choice",
    "pip install -r requirements-no-such.txt": "requirements-no-such.txt",
    "make no-such-target": "no-such-target",
    "pytest -m hopper": "hopper",
    "python3 -m pytest -m hopper": "hopper",
}


RUN_ALL = "import runpy, sys; [runpy.run_path(script, run_name='__main__') for script in sys.argv[1:]]"


@pytest.fixture(scope="module")
def problems():
    """What is wrong with each command of the pages, and with each that is wrong on purpose; None for nothing."""
    right = [command for page in PAGES for command in documented.commands(page)]
    wrong = [documented.shell_commands(text)[0] for text in WRONG]
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "check_commands.py"],
        input=json.dumps(right + wrong),
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    names = [" ".join(command) for command in right] + list(WRONG)
    return dict(zip(names, answers, strict=True))


def test_every_command_runs_up_to_its_work(problems):
    assert len(problems) > len(WRONG) + 20
    found = {command: problem for command, problem in problems.items() if command not in WRONG}
    assert {command: problem for command, problem in found.items() if problem is not None} == {}


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_command_is_found(problems, command):
    assert WRONG[command] in (problems[command] or "")


def test_what_the_shell_cannot_run_is_found():
    with pytest.raises(ValueError, match="wget"):
        documented.shell_commands("wget https://example.org/corpus.txt")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        documented.shell_commands("for name in $(python -c 'print(1 / 0)'); do make $name; done")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_names_a_language_that_is_checked_or_is_text(page):
    assert documented.languages(page) <= {"sh", "python", "text", "bibtex"}


def test_python_blocks_run(tmp_path):
    """Each alone, with no names of another, in a folder with a workdir and a file of the release.

    All run in one process, which imports and compiles once what they share.
    """
    config = dataclasses.replace(tiny_config("corpus").model, vocab_size=257, num_layers=1, pattern=("rat",))
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    run = dataclasses.replace(tiny_config("corpus"), model=config)
    save_model(tmp_path / "runs" / "default", run, model, 0, ByteTokenizer())
    _, release_config, state_dict = recording("rat")
    write_release_file(tmp_path / "rat-xl.pth", ReleaseFile(state_dict, release_config, 0))
    scripts = []
    (tmp_path / "pages").mkdir()
    for page in PAGES:
        for number, block in enumerate(documented.blocks(page, "python"), 1):
            scripts.append(tmp_path / "pages" / f"{page.stem}_{number}.py")
            scripts[-1].write_text(block)
    assert len(scripts) > 8
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": import_path()}
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, *scripts],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr


def test_a_layer_takes_five_lines_and_a_model_ten():
    layer, model, *_ = documented.blocks(ROOT / "README.md", "python")
    assert "layer = Rat(" in layer and len(layer.splitlines()) <= 5
    assert "model = LanguageModel(" in model and len(model.splitlines()) <= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = documented.without_blocks(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if heading:
            assert heading in _anchors(file), f"{page.name} links to {target}"


def _anchors(page: pathlib.Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", documented.without_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_map_names_what_is_there():
    """Every file and folder of the README's map exists, and none of the package is left out."""
    (tree,) = (text for text in documented.blocks(ROOT / "README.md", "text") if "train.py" in text)
    named, folder = set(), ""
    for line in tree.splitlines():
        names = line.strip().split("  ")[0].split()
        if not line.startswith(" "):
            folder = names[0] if names[0].endswith("/") else ""
        named |= {folder + name if line.startswith(" ") else name for name in names}
    missing = {name for name in named if not (ROOT / name).exists()}
    assert missing == set()
    package = ROOT / "rat_jax"
    parts = {f"rat_jax/{path.name}" for path in package.glob("*.py") if path.name != "__init__.py"}
    parts |= {f"rat_jax/{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert parts <= named
