"""eval.py and generate.py on meshes and as jobs of two processes: what one device measures and says, they do too.

What they have of `rat_jax.cluster` is in other files. 2 x 2 is two processes with two virtual devices each, 1 x 4 one
process with four; both cut parameters (fsdp=2).
"""

import functools
import json
import shutil
import signal
import time

import pytest
from flax import nnx

from rat_jax.checkpoints.model_workdir import save_model
from rat_jax.data.corpus import Corpus
from rat_jax.model import LanguageModel
from rat_jax.program import LOST
from rat_jax.training import train
from tests.cluster.job import WAIT_SECS, codes_of, printed, said, started
from tests.commands import call_script
from tests.tiny_run import make_corpus, tiny_config, train_command
from tests.tiny_sft import write_lines

MESHES = [(2, 2), (1, 4)]
PROMPTS = [{"id": number, "prompt": text} for number, text in enumerate(["1 2 3", "", "17 4 9 28 5", "1 2 3"])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a workdir, `run`, of a model without training."""
    folder = tmp_path_factory.mktemp("inference")
    corpus = make_corpus(folder, vocab_size=30, tokenizer="bytes")
    tokenizer = Corpus.open(corpus).tokenizer()
    model = {"model__vocab_size": tokenizer.vocab_size, "model__pattern": ("rnn",), "model__num_layers": 1}
    config = tiny_config(corpus, **model)
    save_model(folder / "run", config, LanguageModel(config.model, rngs=nnx.Rngs(0)), step=7, tokenizer=tokenizer)
    write_lines(folder / "prompts.jsonl", PROMPTS)
    return folder


def run_job(folder, script, *flags, num_processes, devices, code=0):
    """A job, all of which must end with a code."""
    with started(folder, script, *flags, num_processes=num_processes, devices=devices) as processes:
        assert codes_of(processes) == [code] * num_processes, [said(folder, n)[-3000:] for n in range(num_processes)]


def differences(found, wanted, path=""):
    """Places where values of JSON differ: numbers by more than rounding, all else at all."""
    if isinstance(wanted, dict) and isinstance(found, dict) and found.keys() == wanted.keys():
        return [place for name in wanted for place in differences(found[name], wanted[name], f"{path}.{name}")]
    if isinstance(wanted, list) and isinstance(found, list) and len(found) == len(wanted):
        pairs = enumerate(zip(found, wanted, strict=True))
        return [place for number, pair in pairs for place in differences(*pair, f"{path}.{number}")]
    if isinstance(wanted, float) and isinstance(found, float):
        return [] if abs(found - wanted) <= 2e-5 * max(1.0, abs(wanted)) else [f"{path}: {found} {wanted}"]
    return [] if found == wanted else [f"{path}: {found!r} {wanted!r}"]


def sampled(folder, name):
    return [
        *("--workdir", str(folder / "run"), f"--prompts_file={folder / 'prompts.jsonl'}"),
        *(f"--output_file={folder / name}", "--max_new_tokens=12", "--temperature=1.2", "--seed=3"),
    ]


def test_two_processes_continue_prompts_as_one_device(folder, tmp_path):
    """Parameters and rows are cut over both; the first process alone writes and prints."""
    assert call_script("generate.py", *sampled(folder, "alone.jsonl")) == 0
    flags = [*sampled(folder, "two.jsonl"), "--mesh=fsdp=2"]
    run_job(tmp_path, "generate.py", *flags, num_processes=2, devices=2)
    assert (folder / "two.jsonl").read_text() == (folder / "alone.jsonl").read_text()
    assert "times: " in said(tmp_path, 0) and "times: " not in said(tmp_path, 1)
    assert printed(tmp_path, 0) + printed(tmp_path, 1) == ""


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "devices"), MESHES)
def test_greedy_texts_samples_and_log_probabilities(folder, tmp_path, num_processes, devices):
    for name, flags in {
        "greedy": ["--temperature=0"],
        "samples": ["--num_samples=3", "--log_probs", "--batch_size=2", "--order=arrival"],
    }.items():
        alone, several = tmp_path / f"{name}-alone.jsonl", tmp_path / f"{name}-several.jsonl"
        assert call_script("generate.py", *sampled(folder, alone), *flags) == 0
        command = [*sampled(folder, several), *flags, "--mesh=data=2,fsdp=-1"]
        run_job(tmp_path, "generate.py", *command, num_processes=num_processes, devices=devices)
        found, wanted = (
            sorted(map(json.loads, path.read_text().splitlines()), key=lambda line: (line["id"], line.get("sample", 0)))
            for path in (several, alone)
        )
        for line in (*found, *wanted):  # with batches another one may come first
            line.pop("prompt_number", None)
        assert len(wanted) == len(PROMPTS) * (3 if name == "samples" else 1)
        assert differences(found, wanted) == []


@pytest.fixture(scope="module")
def commands(folder):
    """Flags of eval.py's measurements."""
    answers = [{"prompt": "1 2 3", "answer": "4"}, {"prompt": "5 6", "answer": "7 8"}, {"prompt": "9", "answer": "9"}]
    write_lines(folder / "asked.jsonl", answers)
    tasks, rows = folder / "tasks", folder / "rows.jsonl"
    write_lines(rows, [{"question": f"{n} 2 3", "options": ["4", "5 6"], "right": n % 2} for n in range(1, 6)])
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{options}}", "doc_to_target": "{{right}}"}
    until = {"output_type": "generate_until", "doc_to_target": "{{options[0]}}"}
    until |= {"generation_kwargs": {"until": ["9"], "max_gen_toks": 4}, "metric_list": [{"metric": "exact_match"}]}
    tasks.mkdir()
    lost = choice | {"dataset_kwargs": {"data_files": {"test": str(folder / "nowhere.jsonl")}}}
    for name, values in {"choice": choice, "lost": lost, "until": until}.items():
        text = {"task": name, "doc_to_text": "{{question}}", **common, **values}
        (tasks / f"{name}.yaml").write_text(json.dumps(text))  # JSON is YAML
    return {
        "losses": ["--context_lengths=8,16", "--batch_tokens=64"],
        "lengths": ["--length_generalization=4", "--batch_tokens=64"],
        "answers": [f"--sft={folder / 'asked.jsonl'}", "--max_new_tokens=4"],
        "tasks": ["--tasks=choice,lost,until", f"--tasks_dir={tasks}", "--batch_tokens=64"],
        "ruler": ["--tasks=niah_single_1", "--ruler_templates=own", "--limit=3", "--context_lengths=512"],
    }


def results(workdir):
    """What an evaluation wrote, by the names of the files: a picture alone that it is there."""
    found = {}
    for file in workdir.iterdir():
        if file.name.startswith(("evaluation-", "length_generalization-", "answers-", "tasks-", "ruler-")):
            lines = [] if file.suffix == ".png" else file.read_text().splitlines()
            found[file.name] = [json.loads(line) for line in lines] if file.suffix == ".jsonl" else lines
            if file.suffix == ".json":
                found[file.name] = json.loads(file.read_text())
    assert found
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["losses", "lengths", "answers", "tasks", "ruler"])
def test_evaluations(folder, commands, tmp_path, capfd, mode):
    """Figures, answers and names of files are those of one device, and a task without data stops no host."""
    code = 1 if mode == "tasks" else 0

    def measured(name, run):
        """What is written, and what is printed."""
        workdir = tmp_path / name / "run"
        shutil.copytree(folder / "run", workdir)
        text = run("eval.py", "--workdir", str(workdir), *commands[mode], "--json")
        return json.loads(json.dumps([results(workdir), json.loads(text)]).replace(str(workdir), "WORKDIR"))

    def alone(*command):
        assert call_script(*command) == code
        return capfd.readouterr().out

    wanted = measured("alone", alone)

    def several(*command, **sizes):
        run_job(tmp_path, *command, "--mesh=fsdp=2", **sizes, code=code)
        return printed(tmp_path, 0)

    for num_processes, devices in MESHES:
        run = functools.partial(several, num_processes=num_processes, devices=devices)
        assert differences(measured(f"of-{num_processes}", run), wanted) == []
        assert num_processes == 1 or printed(tmp_path, 1) == ""


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["context=2,tensor=2", "context=4", "data=2,tensor=2"])
def test_losses_of_rows_whose_tokens_and_heads_are_cut(tmp_path, mesh):
    corpus = make_corpus(tmp_path, vocab_size=30)
    pattern = ("rat", "local_attention", "rattention", "rnn")
    model = {"model__pattern": pattern, "model__num_layers": 4, "model__num_heads": 4, "model__vocab_size": 30}
    config = tiny_config(corpus, **model)
    tokenizer = Corpus.open(corpus).tokenizer()
    save_model(tmp_path / "run", config, LanguageModel(config.model, rngs=nnx.Rngs(0)), step=7, tokenizer=tokenizer)
    flags = ["eval.py", "--workdir", str(tmp_path / "run"), "--context_lengths=16,32"]
    assert call_script(*flags) == 0
    wanted = results(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    save_model(tmp_path / "run", config, LanguageModel(config.model, rngs=nnx.Rngs(0)), step=7, tokenizer=tokenizer)
    run_job(tmp_path, *flags, f"--mesh={mesh}", num_processes=2, devices=2)
    assert differences(results(tmp_path / "run"), wanted) == []


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"fsdp": 2, "data": -1}, {"data": 1, "fsdp": 2, "context": 2}])
def test_evaluations_of_a_run_that_generate_texts(commands, folder, tmp_path, mesh):
    """Their figures in the log are those of a run on one device."""
    asked = {"every_steps": 4, "file": str(folder / "asked.jsonl"), "max_new_tokens": 4, "context_length": 24}
    needles = {"every_steps": 4, "tasks": ("niah_single_1",), "context_lengths": (320,), "num_examples": 2}
    needles |= {"templates": "own", "answer_tokens": 16}
    tasks = {"every_steps": 4, "names": ("choice", "until"), "folder": str(folder / "tasks"), "limit": 2}
    evaluation = {"on_failure": "stop", "answers": asked, "ruler": needles, "tasks": tasks}
    vocab_size = Corpus.open(folder / "corpus").tokenizer().vocab_size
    model = {"model__vocab_size": vocab_size, "model__pattern": ("rat",), "model__num_layers": 1}
    changes = model | {"training__num_steps": 4, "evaluation": evaluation}

    def config(**mesh):
        return tiny_config(folder / "corpus", **changes, **{f"mesh__{axis}": size for axis, size in mesh.items()})

    assert train(config(), tmp_path / "alone").finished
    with started(tmp_path, *train_command(tmp_path, config(**mesh))[1:]) as processes:  # the harness wants PyTorch
        assert codes_of(processes) == [0, 0], [said(tmp_path, number)[-3000:] for number in range(2)]

    def figures(workdir):
        lines = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
        found = {name: value for line in lines for name, value in line.items() if "/" in name}
        return {name: float(value) for name, value in found.items() if name.split("/")[0] in evaluation}

    found, wanted = figures(tmp_path / "run"), figures(tmp_path / "alone")
    for values in (found, wanted):
        assert {values.pop(f"{kind}/secs") > 0 for kind in ("answers", "ruler", "tasks")} == {True}
    assert len(wanted) >= 6
    assert differences(found, wanted) == []


@pytest.mark.slow
def test_a_lost_process_ends_the_other_and_one_process_goes_on(folder, tmp_path):
    """The second is killed as soon as a text is there; the file is then completed as if nothing had been."""
    flags = [*sampled(folder, tmp_path / "texts.jsonl"), "--max_new_tokens=600", "--num_samples=20", "--batch_size=4"]
    with started(tmp_path, "generate.py", *flags) as processes:
        until = time.monotonic() + WAIT_SECS
        while not (tmp_path / "texts.jsonl").exists() or not (tmp_path / "texts.jsonl").read_text():
            assert [process.poll() for process in processes] == [None, None], said(tmp_path, 0)[-3000:]
            assert time.monotonic() < until
            time.sleep(0.02)
        processes[1].send_signal(signal.SIGKILL)
        assert processes[0].wait(timeout=WAIT_SECS) == LOST, said(tmp_path, 0)[-3000:]
    assert "error: process 1 is lost: its connection was closed; " in said(tmp_path, 0)
    num_done = len((tmp_path / "texts.jsonl").read_text().splitlines())
    assert 0 < num_done < 20 * len(PROMPTS)
    assert call_script("generate.py", *flags) == 0
    assert call_script("generate.py", *flags, f"--output_file={tmp_path / 'whole.jsonl'}") == 0
    assert (tmp_path / "texts.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["eval.py", "generate.py"])
def test_what_does_not_fit_is_refused_by_all(folder, tmp_path, script):
    for each, flag, message in (
        ({1: ["--seed=4"] if script == "generate.py" else ["--batch_tokens=64"]}, None, "differs from process 0: --"),
        ({}, "--mesh=fsdp=3", "--mesh: data -1, fsdp 3, context 1, tensor 1 do not multiply to the 4 devices"),
        ({}, "--workdir=nowhere", "there is no workdir"),
    ):
        flags = [*sampled(folder, tmp_path / "texts.jsonl")] if script == "generate.py" else ["--workdir=runs/any"]
        with started(tmp_path, script, *flags, *([flag] if flag else []), each=each) as processes:
            assert codes_of(processes) == [2, 2]
        for number in range(2):
            assert message in said(tmp_path, number)
            assert "Traceback" not in said(tmp_path, number)
    assert not (tmp_path / "texts.jsonl").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "fsdp=3",
            "--mesh: data -1, fsdp 3, context 1, tensor 1 do not multiply to the 1 devices that are there; "
            "those that are given must divide 1",
        ),
        ("", "--mesh is empty: give AXIS=SIZE, as fsdp=4, or leave the flag out"),
        ("4", "--mesh has '4': it takes AXIS=SIZE with commas between, the axes data, fsdp, context, tensor"),
        ("rows=4", "--mesh has 'rows=4': it takes AXIS=SIZE"),
        ("fsdp=2,fsdp=1", "--mesh has fsdp twice"),
        ("fsdp=two", "--mesh has 'fsdp=two': a size is a whole number, or -1"),
        ("fsdp=0", "--mesh: fsdp must be 1 or more, or -1, got 0"),
        ("data=-1,fsdp=-1", "--mesh: data and fsdp cannot all be -1"),
    ],
)
def test_meshes_that_cannot_be(folder, capsys, value, message):
    for script in ("eval.py", "generate.py"):
        flags = ["--workdir", folder / "run", f"--mesh={value}"]
        assert call_script(script, *flags, *(["--prompt=1"] if script == "generate.py" else [])) == 2
        assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--num_processes=2", "--num_processes without --coordinator_address and --process_id: give all three"),
        ("--lost_after_secs=1", "--lost_after_secs is 1; it must be 5 or more seconds"),
    ],
)
def test_flags_of_a_start_that_do_not_fit(folder, capsys, flag, message):
    for script in ("eval.py", "generate.py"):
        assert call_script(script, "--workdir", folder / "run", flag) == 2
        assert message in capsys.readouterr().err
