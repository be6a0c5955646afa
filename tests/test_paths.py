"""Paths of every flag and config field: none is used as it was typed."""

import ast
import dataclasses
import importlib
import operator
import pathlib
import runpy
import sys
import types
import typing

import pytest

from rat_jax.config import Config, with_absolute_paths
from rat_jax.data.tokenizer import ByteTokenizer
from rat_jax.data_config import CorpusConfig
from rat_jax.paths import PathError, absolute_source
from rat_jax.program import exit_code
from tests.commands import ROOT, call_script
from tests.tiny_run import tiny_config

URL = "gs://bucket/x"
ROOMS = ("rat_jax", "benchmarks", "docs")

# Fields of a config that hold text: those that name a file or folder, and the others.
PATH_FIELDS = ["data.path", "evaluation.answers.file", "evaluation.ruler.essay", "evaluation.tasks.folder", "init.path"]
TEXT_FIELDS = {
    "evaluation.ruler.tasks",
    "evaluation.tasks.names",
    "model.pattern",
    "training.wandb_project",
}

# Flags that take text, by program: those that name a file or folder, each with a command that gives it a URL, and the
# others. TMP is an empty folder, RUN a workdir.
PREPARE = "rat_jax/data/prepare.py --out=TMP/out --num_workers=0"
RULER = "--task=niah_single_2 --length=512 --num=1 --split=train --templates=own"
PATH_FLAGS = {
    "rat_jax/config_file.py": {"_NAME": "train.py --workdir=TMP/run --config=URL"},
    "rat_jax/compilation_cache.py": {"_FLAG": "eval.py --workdir=RUN --compilation_cache=URL"},
    "train.py": {"workdir": "--config=configs/default.py --workdir=URL"},
    "eval.py": {
        "workdir": "--workdir=URL",
        "data_path": "--workdir=RUN --compilation_cache=off --data_path=URL",
        "tasks_dir": "--workdir=RUN --compilation_cache=off --tasks=mine --tasks_dir=URL",
        "sft": "--workdir=RUN --compilation_cache=off --sft=URL",
        "ruler_essay": "--workdir=RUN --compilation_cache=off --tasks=vt --ruler_templates=own --ruler_essay=URL",
    },
    "generate.py": {
        "workdir": "--prompt=a --workdir=URL",
        "prompts_file": "--workdir=RUN --prompts_file=URL",
        "output_file": "--workdir=RUN --prompt=a --output_file=URL",
        "data_path": "--workdir=RUN --compilation_cache=off --prompt=a --data_path=URL",
    },
    "rat_jax/checkpoints/__main__.py": {
        "workdir": "export URL TMP/new",
        "folder": "export RUN URL",
        "path": "verify URL",
    },
    "rat_jax/data/prepare_flags.py": {
        "--source": f"{PREPARE} --tokenizer=bytes --source URL",
        "--tokenizer": f"{PREPARE} --source TMP --tokenizer=URL",
        "--out": "rat_jax/data/prepare.py --source TMP --tokenizer=bytes --out=URL",
        "--validation_source": f"{PREPARE} --tokenizer bytes --source=a --validation_source=URL",
        "--chat_template": f"{PREPARE} --tokenizer=bytes --source TMP --chat_template=URL",
    },
    "rat_jax/data/sft_tasks.py": {
        "--source": "qmsum --out=TMP/x --source URL",
        "--out": "qmsum --source TMP --out=URL",
    },
    "rat_jax/evaluation/ruler/__main__.py": {
        "--tokenizer": f"{RULER} --out=TMP/x --tokenizer=URL",
        "--out": f"{RULER} --tokenizer=bytes --out=URL",
        "--essay": f"{RULER} --tokenizer=bytes --out=TMP/x --essay=URL",
    },
    "rat_jax/release/__main__.py": {
        "file": "import URL TMP/new",
        "workdir": "export URL TMP/x.pth",
        "--tokenizer": "import TMP/x.pth TMP/new --tokenizer=URL",
    },
    "rat_jax/report/__main__.py": {"workdirs": "URL --out=TMP/x.html", "--out": "RUN --out=URL"},
    "benchmarks/cache_sizes.py": {"--configs": "--configs URL"},
    "benchmarks/context_exchange.py": {"--config": "--topology v5e:2x2 --seq_len 64 --config URL"},
    "benchmarks/data_throughput.py": {"--folder": "--folder URL"},
    "benchmarks/decode_throughput.py": {
        "--configs": "--configs URL",
        "--compilation_cache": "--configs configs/default.py --compilation_cache URL",
        "--profile": "--configs configs/default.py --profile URL",
        "--out": "--configs configs/default.py --out URL",
    },
    "benchmarks/evidence/gather.py": {"--out": "--small --out URL"},
    "benchmarks/evidence/report.py": {"folder": "URL", "--pictures": "TMP --pictures URL"},
    "benchmarks/evidence/run_model.py": {"--corpus": "rat --out TMP/x --corpus URL", "--out": "rat --out URL"},
    "benchmarks/evidence/run_speeds.py": {"--out": "--out URL"},
    "benchmarks/evidence/run_studies.py": {"--corpus": "--out TMP/x --corpus URL", "--out": "--out URL"},
    "benchmarks/guard_costs.py": {"--config": "--config URL"},
    "benchmarks/layer_latency.py": {"--out": "--out URL"},
    "benchmarks/model_throughput.py": {"--config": "--config URL", "--profile": "--config x --profile URL"},
    "benchmarks/recall.py": {"workdirs": "URL", "--out": "RUN --out URL"},
    "benchmarks/rivals/compare.py": {"--ours": "--ours URL", "--out": "--out URL", "--release": "--release URL"},
    "benchmarks/scoring.py": {"--config": "--config URL"},
    "docs/draw_length_generalization.py": {"runs": "URL", "--out": "TMP/x.json --out URL"},
}
TEXT_FLAGS = {
    "eval.py": {"context_lengths", "tasks"},
    "generate.py": {"prompt", "stop"},
    "rat_jax/cluster/launch.py": {"coordinator_address"},
    "rat_jax/mesh_flag.py": {"mesh"},
    "train.py": {"topology"},
    "rat_jax/data/prepare_flags.py": {"--document_separator", "--eos_token", "--field"},
    "rat_jax/evaluation/ruler/__main__.py": {"--eos_token", "--task", "--templates", "--words"},
    "rat_jax/release/__main__.py": {"--eos_token"},
    "benchmarks/context_exchange.py": {"--topology"},
    "benchmarks/evidence/gather.py": {"--debian_mirror"},
    "benchmarks/guard_costs.py": {"--remat", "--topology"},
    "benchmarks/layer_latency.py": {"--decode_layers", "--layers", "--torch_layers"},
    "benchmarks/linear_branch.py": {"--implementation"},
    "benchmarks/model_throughput.py": {"--remat"},
    "benchmarks/scoring.py": {"--dtype"},
}


def text_fields(cls: type, prefix: str = ""):
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from text_fields(hint, f"{prefix}{name}.")
        elif holds_text(hint):
            yield prefix + name


def holds_text(hint) -> bool:
    return hint in (str, pathlib.Path) or (
        typing.get_origin(hint) in (typing.Union, types.UnionType, tuple)
        and any(map(holds_text, typing.get_args(hint)))
    )


def text_flags(code: str):
    """Names of the flags that a file defines and that may hold any text."""
    if "DEFINE_" not in code and "add_argument" not in code:
        return
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not node.args:
            continue
        name = node.args[0].value if isinstance(node.args[0], ast.Constant) else ast.unparse(node.args[0])
        settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        match node.func.attr:
            case "DEFINE_string" | "DEFINE_list" | "DEFINE_multi_string" | "DEFINE_config_file":
                yield name
            case "add_argument":
                is_switch = settings.get("action", "").startswith("'store_")
                if not is_switch and "choices" not in settings and settings.get("type") not in ("int", "float"):
                    yield name


def test_every_field_and_flag_is_known_as_a_path_or_as_none():
    """A new one is to be entered above, with a command where it is a path."""
    assert set(text_fields(Config)) == {*PATH_FIELDS, *TEXT_FIELDS}
    found = {}
    for file in [*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))]:
        if names := set(text_flags(file.read_text())):
            found[str(file.relative_to(ROOT))] = names
    known = {file: set(PATH_FLAGS.get(file, {})) | TEXT_FLAGS.get(file, set()) for file in {*PATH_FLAGS, *TEXT_FLAGS}}
    assert found == known


@pytest.mark.parametrize("name", PATH_FIELDS)
def test_a_field_is_stored_absolute(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def stored(value):
        config = tiny_config("/corpus")
        *groups, field = name.split(".")
        for depth in range(len(groups), -1, -1):
            owner = operator.attrgetter(".".join(groups[:depth]))(config) if depth else config
            value = dataclasses.replace(owner, **{(*groups, field)[depth]: value})
        return operator.attrgetter(name)(with_absolute_paths(value))

    assert stored("a/b") == stored("~/a/b") == str(tmp_path / "a/b")
    with pytest.raises(PathError, match=f"config.{name} is '{URL}': gs:// is not read directly"):
        stored(URL)


def test_paths_of_corpora_are_stored_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny_config("/corpus")

    def stored(path):
        data = dataclasses.replace(config.data, path="", corpora={"code": CorpusConfig(path, 1.0)})
        return with_absolute_paths(dataclasses.replace(config, data=data)).data.corpora["code"].path

    assert stored("a/b") == str(tmp_path / "a/b")
    with pytest.raises(PathError, match=r"config\.data\.corpora\.code\.path is 'gs://.* is not read directly"):
        stored(URL)
    with pytest.raises(PathError, match=r"config\.data\.corpora\.code\.path must be a path, got ''"):
        stored("")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A workdir, whose model is not there to be read."""
    workdir = tmp_path / "run"
    (workdir / "tokenizer").mkdir(parents=True)
    ByteTokenizer().save(workdir / "tokenizer")
    config = tiny_config(tmp_path, model__vocab_size=257)
    loaded = types.SimpleNamespace(config=config, step=1, model=None, mesh=None)
    monkeypatch.setattr("rat_jax.checkpoints.load_model", lambda *arguments, **settings: loaded)
    return workdir


@pytest.mark.parametrize(
    ("file", "flag"), [pytest.param(f, n, id=f"{f}:{n}") for f, names in PATH_FLAGS.items() for n in names]
)
def test_a_flag_takes_no_url(file, flag, run, tmp_path, monkeypatch, capsys):
    for name in ("describe", "share_memory"):
        monkeypatch.setattr(f"benchmarks.card.{name}", lambda: "")
    (tmp_path / "empty").mkdir()
    words = PATH_FLAGS[file][flag].replace("RUN", str(run)).replace("TMP", str(tmp_path / "empty")).replace("URL", URL)
    first, *rest = arguments = words.split()
    if first.endswith(".py") and not first.startswith("--"):
        file, arguments = first, rest
    monkeypatch.chdir(ROOT)
    if "/" not in file:
        code = call_script(file, *arguments)
    else:
        monkeypatch.setattr(sys, "argv", [file, *arguments])
        if file.startswith("rat_jax/"):
            main = importlib.import_module(file.removesuffix(".py").replace("/", ".")).main
        else:
            main = runpy.run_path(file)["main"]
        code = exit_code(main)
    said = capsys.readouterr().err
    assert code == 2, said
    assert f"is '{URL}': gs:// is not read directly: mount it" in said
    assert list((tmp_path / "empty").iterdir()) == []


def test_sources_of_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_source("a") == str(tmp_path / "a")
    assert absolute_source("jsonl:a") == f"jsonl:{tmp_path / 'a'}"
    assert absolute_source("python-stdlib") == "python-stdlib"
    assert absolute_source("hf:a/b") == "hf:a/b"
