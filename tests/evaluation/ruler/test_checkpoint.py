"""RULER of a checkpoint: what is printed and what is written."""

import json

import pytest
from flax import nnx

from rat_jax.checkpoints import Workdir
from rat_jax.checkpoints.model_workdir import save_model
from rat_jax.checkpoints.store import LoadedModel
from rat_jax.config import MeshConfig
from rat_jax.data.tokenizer import ByteTokenizer
from rat_jax.errors import RatJaxError, RunStopped
from rat_jax.evaluation import EvaluationError
from rat_jax.evaluation.ruler import are_ruler_tasks, evaluate_checkpoint, evaluation
from rat_jax.evaluation.subject import Subject
from rat_jax.model import LanguageModel
from rat_jax.sharding import make_mesh
from tests.commands import call_script
from tests.evaluation.ruler.reader import read_answers
from tests.small import small_model
from tests.tiny_run import tiny_config

TOKENIZER = ByteTokenizer()


def oracle(model, tokenizer, prompts, **settings):
    return [", ".join(read_answers(tokenizer.decode(prompt))) for prompt in prompts]


@pytest.fixture(scope="module")
def model():
    return small_model(("rat", "local_attention"), vocab_size=257)


@pytest.fixture
def measure(monkeypatch, tmp_path, model):
    """Measures a model whose answers are an oracle's."""
    monkeypatch.setattr(evaluation, "generate_text", oracle)
    loaded = LoadedModel(model=model, config=tiny_config("corpus", model__vocab_size=257), step=7, path=tmp_path / "7")
    (tmp_path / "tokenizer").mkdir()
    TOKENIZER.save(tmp_path / "tokenizer")
    subject = Subject(loaded, Workdir(tmp_path), make_mesh(MeshConfig(data=1, fsdp=1)), None)
    settings = {"context_lengths": [600], "batch_tokens": 600, "num_examples": 2, "templates": "own"}

    def run(tasks, print_json=False, **changes):
        evaluate_checkpoint(subject, tasks=tasks, print_json=print_json, **settings | changes)

    return run


def test_what_is_printed_and_written(measure, tmp_path, capsys):
    measure(["niah_single_1", "fwe"])
    printed = capsys.readouterr()
    assert printed.out.startswith(
        "RULER, 2 examples of the validation split, greedy; prompts from rat_jax (Apache-2.0)"
    )
    assert "niah_single_1 at 600: 100.0 %" in printed.err
    (file,) = tmp_path.glob("ruler-7-niah_single_1_fwe-*.json")
    assert file.with_suffix(".png").is_file()
    assert printed.err.endswith(f"written to {file} and {file.with_suffix('.png')}\n")
    values = json.loads(file.read_text())
    assert (values["step"], values["trained_length"]) == (7, 16)
    assert values["measured"]["context_lengths"] == [600]
    assert [result["scores"]["exact_match"] for result in values["results"]] == [100.0, 100.0]

    measure(["niah_single_1", "fwe"], print_json=True)
    assert json.loads(capsys.readouterr().out) == values
    assert list(tmp_path.glob("ruler-*.json")) == [file]  # the same measurement has the same name
    measure(["niah_single_1", "fwe"], seed=1)
    assert len(list(tmp_path.glob("ruler-*.json"))) == 2


def test_a_command_given_again_keeps_what_it_does_not_reach(measure, monkeypatch, tmp_path):
    measure(["niah_single_1", "fwe"])
    (file,) = tmp_path.glob("ruler-*.json")
    before = json.loads(file.read_text())

    def answer(model, tokenizer, prompts, **settings):
        raise KeyboardInterrupt

    def first_then_answer(model, tokenizer, prompts, **settings):
        monkeypatch.setattr(evaluation, "generate_text", answer)
        return oracle(model, tokenizer, prompts)

    monkeypatch.setattr(evaluation, "generate_text", first_then_answer)
    with pytest.raises(RunStopped, match="interrupted"):
        measure(["niah_single_1", "fwe"])
    assert json.loads(file.read_text()) == before


def test_tasks_without_needles_have_no_picture(measure, tmp_path):
    measure(["fwe"])
    assert len(list(tmp_path.glob("ruler-*"))) == 1


def test_a_task_that_fails_does_not_lose_the_others(measure, tmp_path, capsys):
    with pytest.raises(RunStopped, match="1 of 2 measurements failed"):
        measure(["cwe", "niah_single_1"])
    assert "cwe at 600 failed: cwe does not fit 600 tokens" in capsys.readouterr().out
    (file,) = tmp_path.glob("ruler-*.json")
    assert [sorted(result)[:2] for result in json.loads(file.read_text())["results"]] == [
        ["context_length", "error"],
        ["answer_tokens", "by_depth"],
    ]
    with pytest.raises(EvaluationError, match="cwe does not fit 600 tokens"):
        measure(["cwe"])
    assert len(list(tmp_path.glob("ruler-*.json"))) == 1


@pytest.mark.parametrize("cut", ["interrupt", "file"])
def test_what_was_measured_before_the_end_is_kept(measure, monkeypatch, tmp_path, capsys, cut):
    def answer(model, tokenizer, prompts, **settings):
        if "Count the words" in tokenizer.decode(prompts[0]):
            (file,) = tmp_path.glob("ruler-*.json")
            if cut == "interrupt":
                raise KeyboardInterrupt
            file.unlink()
            file.mkdir()  # a place that cannot be written to, whoever runs the tests
        return oracle(model, tokenizer, prompts)

    monkeypatch.setattr(evaluation, "generate_text", answer)
    with pytest.raises(RunStopped, match="only the results above are there: ") as caught:
        measure(["niah_single_1", "fwe", "vt"])
    assert ("interrupted" in str(caught.value)) == (cut == "interrupt")
    assert "niah_single_1" in capsys.readouterr().out


def test_before_the_first_result_a_signal_ends_it(measure, monkeypatch):
    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "generate_text", interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure(["niah_single_1"])


def test_a_picture_that_cannot_be_written(measure, tmp_path):
    measure(["niah_single_1"])
    (picture,) = tmp_path.glob("*.png")
    picture.unlink()
    picture.mkdir()
    with pytest.raises(RunStopped, match=r"\.png cannot be written"):
        measure(["niah_single_1"])


def test_tasks_of_ruler_are_told_from_others():
    assert are_ruler_tasks(["ruler"]) and are_ruler_tasks(["vt", "niah_single_1"])
    assert not are_ruler_tasks(["arc_easy"]) and not are_ruler_tasks([])
    with pytest.raises(RatJaxError, match="ruler is of RULER, the other tasks are not: measure them with a command"):
        are_ruler_tasks(["arc_easy", "ruler"])


@pytest.mark.slow  # tests/test_docs.py runs it up to its work, test_evaluation.py does the work
def test_the_script(tmp_path, capsys):
    config = tiny_config("corpus", model__vocab_size=257)
    workdir = tmp_path / "run"
    save_model(workdir, config, LanguageModel(config.model, rngs=nnx.Rngs(0)), 3, TOKENIZER)
    arguments = [f"--workdir={workdir}", "--tasks=niah_single_1", "--context_lengths=440,448", "--limit=2"]
    assert call_script("eval.py", *arguments, "--ruler_templates=own", "--ruler_answer_tokens=24") == 0
    printed = capsys.readouterr()
    assert "niah_single_1                  0.0       0.0" in printed.out
    (file,) = workdir.glob("ruler-3-niah_single_1-*.json")
    values = json.loads(file.read_text())
    assert values["measured"]["answer_tokens"] == 24
    assert [result["context_length"] for result in values["results"]] == [440, 448]

    for flag, message in (
        ("--num_fewshot=1", "--num_fewshot has no effect with --tasks=niah_single_1"),
        ("--max_batches=1", "--max_batches has no effect with --tasks"),
        ("--tasks=niah_single_1,arc_easy", "niah_single_1 is of RULER, the other tasks are not"),
        ("--tasks=arc_easy --ruler_seed=1", "--ruler_seed has no effect with --tasks=arc_easy"),
    ):
        assert call_script("eval.py", *arguments, *flag.split()) == 2
        assert message in capsys.readouterr().err
    assert call_script("eval.py", f"--workdir={workdir}", "--ruler_essay=x") == 2
    assert "--ruler_essay has no effect without --tasks=ruler" in capsys.readouterr().err
