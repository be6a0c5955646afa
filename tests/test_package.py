"""The package as users install it: built, unpacked and imported far from this repository."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
from packaging.requirements import Requirement

import rat_jax

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("rat_jax", "pallas_kernels")
IMPORT_ALL = """
import importlib, importlib.metadata, pathlib, pkgutil, sys
import rat_jax
sys.modules["torch"] = None  # cannot be imported: users need not have it
# What eval.py imports where requirements-eval.txt is installed.
needs_more = {"rat_jax.evaluation.harness", "rat_jax.evaluation.harness_tasks"}
for module in pkgutil.walk_packages(rat_jax.__path__, "rat_jax."):
    if not module.name.endswith("__main__") and module.name not in needs_more:
        importlib.import_module(module.name)
assert not {"configs", "benchmarks", "tests"} & set(sys.modules)
print(pathlib.Path(rat_jax.__file__).parent.parent, rat_jax.__version__, importlib.metadata.version("rat_jax"))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of the sources, so that nothing is built inside the repository."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt"):
        shutil.copy(ROOT / name, source)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_every_module_task_file_and_template(wheel):
    with zipfile.ZipFile(wheel) as file:
        packed = {name for name in file.namelist() if name.endswith((".py", ".yaml")) or "/templates/" in name}
    files = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for pattern in ("*.py", "*.yaml", "templates/*")
        for path in (ROOT / package).rglob(pattern)
    }
    assert packed == files


def test_the_wheel_requires_what_requirements_txt_lists(wheel):
    with zipfile.ZipFile(wheel) as file:
        (metadata,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        lines = file.read(metadata).decode().splitlines()
    required = {Requirement(line.removeprefix("Requires-Dist:")) for line in lines if line.startswith("Requires-Dist:")}
    listed = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    assert required == {Requirement(line) for line in listed if line}


def test_installed_it_is_imported_from_any_folder(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    environment = os.environ | {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(site), rat_jax.__version__, rat_jax.__version__]


def test_the_constraints_fit_the_requirements():
    """Every pinned version is one that the requirements allow for the Python that the pins are for."""

    def lines(name):
        return [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]

    pins = {pin.name: pin for pin in map(Requirement, filter(None, lines("constraints-jax-0.11.txt")))}
    names = ("requirements.txt", "requirements-gpu.txt", "requirements-test.txt")
    requirements = [Requirement(line) for name in names for line in lines(name) if line and not line.startswith("-r")]
    environment = {"python_version": "3.12", "sys_platform": "linux"}
    checked = set()
    for requirement in requirements:
        if requirement.name in pins and (requirement.marker is None or requirement.marker.evaluate(environment)):
            (pin,) = pins[requirement.name].specifier
            assert pin.operator == "==" and requirement.specifier.contains(pin.version), f"{requirement} and {pin}"
            checked.add(requirement.name)
    assert checked == set(pins) - {"jaxlib"}
