"""What evaluators put into the log is what their functions say of the saved checkpoint; what cannot be is refused."""

import importlib.util
import json
import random
import zlib

import jax
import numpy as np
import pytest
from flax import nnx

from rat_jax.checkpoints.store import load_model
from rat_jax.checkpoints.workdir import Workdir
from rat_jax.data.corpora import Corpora
from rat_jax.data.tokenizer import ByteTokenizer
from rat_jax.errors import ConfigError
from rat_jax.evaluation import EvaluationError, answers
from rat_jax.evaluation.answers import AnswerSettings, evaluate_answers
from rat_jax.evaluation.harness import HarnessModel
from rat_jax.evaluation.harness_tasks import Tasks
from rat_jax.evaluation.ruler import measurement, run_ruler
from rat_jax.evaluation.subject import Subject
from rat_jax.evaluation.text_settings import TextSettings
from rat_jax.sharding import make_mesh
from rat_jax.training import train
from rat_jax.training.evaluators import make_evaluators
from rat_jax.training.evaluators.text_model import TextModel
from tests.evaluation.test_harness import metric, write_task
from tests.stopped_run import assert_same_run, tree
from tests.tiny_run import NUM_STEPS, make_corpus, tiny_config
from tests.tiny_sft import write_lines

TOKENIZER = ByteTokenizer()
LENGTH, NUM_EXAMPLES, ANSWER_TOKENS, SEED = 320, 2, 16, 3
RULER = {
    "every_steps": NUM_STEPS,
    "tasks": ("niah_single_1",),
    "context_lengths": (LENGTH,),
    "num_examples": NUM_EXAMPLES,
    "templates": "own",
    "essay": None,
    "answer_tokens": ANSWER_TOKENS,
    "seed": SEED,
    "batch_tokens": 2 * LENGTH,
}
MODEL = {"model__vocab_size": 257, "model__num_layers": 1, "model__pattern": ("rnn",)}
RECORDS = [{"prompt": f"{i} {i * i}", "answer": "7 1 7"} for i in range(3)]
ANSWERS = {"every_steps": NUM_STEPS, "context_length": 32, "max_new_tokens": 16, "limit": 2, "batch_tokens": 64}
TASKS = {"every_steps": NUM_STEPS, "names": ("texts", "until"), "limit": 2, "batch_tokens": 128}


def by_text(text: str, *_) -> float:
    """A number that any other text would change."""
    return zlib.crc32(text.encode()) / 2**32


@pytest.fixture(scope="module")
def patch(tmp_path_factory):
    """Scores that tell one prediction from another, and a cache of data sets that is the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(measurement, "scores", lambda text, _: dict.fromkeys(measurement.METRICS, by_text(text)))
        patch.setattr(answers, "token_f1", by_text)
        yield patch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus of bytes, prompts with answers, task files."""
    folder = tmp_path_factory.mktemp("evaluators")
    make_corpus(folder, tokenizer="bytes")
    write_lines(folder / "asked.jsonl", RECORDS)
    tasks = folder / "tasks"
    tasks.mkdir()
    bits = {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    write_task(tasks, "texts", [{"text": f"{i} words"} for i in range(3)], metric_list=[bits], **rolling)
    until = {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["x"], "max_gen_toks": 8},
        "metric_list": [metric("exact_match")],
    }
    write_task(tasks, "until", RECORDS, **until)
    write_task(tasks, "gone", RECORDS, **until)
    (tasks / "gone.jsonl").unlink()
    return folder


@pytest.fixture(scope="module")
def config(folder):
    return tiny_config(
        folder / "corpus",
        **MODEL,
        evaluation__ruler=RULER,
        evaluation__answers=ANSWERS | {"file": str(folder / "asked.jsonl")},
        evaluation__tasks=TASKS | {"folder": str(folder / "tasks")},
    )


@pytest.fixture(scope="module")
def finished(config, folder, patch):
    before = random.getstate(), np.random.get_state()  # noqa: NPY002  # the harness seeds both
    assert train(config, folder / "run").finished
    assert random.getstate() == before[0]
    np.testing.assert_equal(np.random.get_state(), before[1])  # noqa: NPY002
    return folder / "run"


@pytest.fixture(scope="module")
def loaded(config, finished):
    return load_model(finished, mesh=make_mesh(config.mesh))


@pytest.fixture(scope="module")
def logged(finished):
    """The last figures."""
    records = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    found = {}
    for record in records:
        if record["step"] == NUM_STEPS:
            found |= record
    return found


def of_group(logged, name):
    prefix = f"{name}/"
    return {key.removeprefix(prefix): logged[key] for key in logged if key.startswith(prefix) and "secs" not in key}


def test_ruler(logged, loaded):
    settings = {name: value for name, value in RULER.items() if name != "every_steps"}
    (found,) = run_ruler(loaded.model, TOKENIZER, **settings).measurements
    assert len(found.predictions) == NUM_EXAMPLES and 0 < found.mean("string_match_all") < 100
    assert of_group(logged, "ruler") == {f"niah_single_1_{LENGTH}": found.mean("string_match_all")}


def test_answers(logged, loaded, folder, tmp_path, capsys):
    (tmp_path / "tokenizer").mkdir()
    TOKENIZER.save(tmp_path / "tokenizer")
    evaluate_answers(
        Subject(loaded, Workdir(tmp_path), make_mesh(loaded.config.mesh), None),
        folder / "asked.jsonl",
        AnswerSettings(ANSWERS["context_length"], ANSWERS["max_new_tokens"]),
        batch_tokens=64,
        limit=ANSWERS["limit"],
        print_json=True,
    )
    expected = json.loads(capsys.readouterr().out)["scores"]
    assert 0 < expected["token_f1"] < 100
    assert of_group(logged, "answers") == expected


def test_tasks(logged, loaded, folder):
    settings = TextSettings(loaded.config.data.seq_len)
    model = HarnessModel(loaded.model, TOKENIZER, make_mesh(loaded.config.mesh), settings, batch_tokens=128)
    tasks, expected = Tasks(["texts", "until"], folder / "tasks"), {}
    for name in tasks.names:
        found = tasks.run(name, model, num_fewshot=None, limit=TASKS["limit"])["results"][name]
        expected |= {f"{name}_{key.removesuffix(',none')}": value for key, value in found.items() if "," in key}
    assert expected["texts_bits_per_byte"] > 0 and "until_exact_match_stderr" in expected
    expected = {key: value for key, value in expected.items() if isinstance(value, float)}
    assert of_group(logged, "tasks") == expected


def test_the_run_is_the_same_without_and_nothing_else_is_written(config, folder, finished, tmp_path, capfd):
    plain = tiny_config(folder / "corpus", **MODEL)
    assert train(plain, tmp_path / "run").finished
    assert_same_run(finished, tmp_path / "run")
    assert {path.name for path in finished.iterdir()} == {path.name for path in (tmp_path / "run").iterdir()}
    before = tree(finished)
    assert train(config, finished).finished
    assert tree(finished) == before
    assert capfd.readouterr().out == ""


def test_a_signal_is_heard_between_answers(config, folder, loaded, patch):
    class Signal(Exception):
        pass

    def check():
        raise Signal

    mesh = make_mesh(config.mesh)
    made = make_evaluators(config, Corpora.open(config.data), mesh, Workdir(folder / "run"))
    assert [evaluator.name for evaluator in made] == ["ruler", "answers", "tasks"]
    for evaluator in made:
        with jax.set_mesh(mesh), pytest.raises(Signal):
            evaluator.run(nnx.state(loaded.model), NUM_STEPS, check)


WRONG = {
    "an unknown task of RULER": ("ruler", {"tasks": ("niah_9",)}, "there is no RULER task 'niah_9'"),
    "a short context": ("ruler", {"context_lengths": (64,)}, "niah_single_1 does not fit 64 tokens"),
    "no essay": ("ruler", {"tasks": ("niah_single_2",)}, "niah_single_2 hides its needles in an essay"),
    "an essay that is not there": ("ruler", {"essay": "/no/such.txt"}, "/no/such.txt"),
    "no prompts": ("answers", {"file": "/no/such.jsonl"}, "/no/such.jsonl"),
    "no room": ("answers", {"context_length": 16}, "answers of up to 16 tokens leave no room"),
    "no task files": ("tasks", {"folder": "/no/such"}, "there is no folder /no/such"),
    "no data": ("tasks", {"names": ("gone",)}, "task gone: the data set json .* cannot be loaded"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_can_have_no_result_is_refused_before_anything_is_written(name, config, folder, patch, tmp_path):
    group, changes, message = WRONG[name]
    base = {"ruler": RULER, "answers": ANSWERS | {"file": str(folder / "asked.jsonl")}, "tasks": TASKS}[group]
    if group == "tasks":
        base = base | {"folder": str(folder / "tasks")}
    wrong = tiny_config(folder / "corpus", model__vocab_size=257, **{f"evaluation__{group}": base | changes})
    with pytest.raises(EvaluationError, match=f"^config.evaluation.{group}: .*{message}") as found:
        train(wrong, tmp_path / "run")
    assert "\n" not in str(found.value)
    assert not any(tmp_path.rglob("*.json*"))


@pytest.mark.parametrize(("package", "group"), [("lm_eval", "tasks"), ("rouge_score", "answers")])
def test_packages_that_are_missing_are_named(package, group, config, monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else real(name, *rest))
    with pytest.raises(EvaluationError, match=rf"^config.evaluation.{group}: .*pip install -r requirements-eval"):
        train(config, tmp_path / "run")


def test_other_tokenizers_are_refused(config, folder):
    corpora, mesh = Corpora.open(config.data), make_mesh(config.mesh)
    with pytest.raises(EvaluationError, match=r"has a vocabulary of 257, but config.model.vocab_size is 300"):
        TextModel(tiny_config(folder / "corpus", model__vocab_size=300), corpora, mesh)


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        ("ruler", {"every_steps": 2, "context_lengths": (64,)}, "ruler.tasks must name at least one"),
        ("ruler", {"every_steps": 2, "tasks": ("vt",)}, "ruler.context_lengths must name at least one"),
        ("ruler", {"num_examples": 0}, "ruler.num_examples must be 1 or more, got 0"),
        ("answers", {"every_steps": 2}, "answers.file must name at least one"),
        ("tasks", {"every_steps": 0, "names": ("a",)}, "tasks.every_steps must be 1 or more, got 0"),
        ("tasks", {"every_steps": 2}, "tasks.names must name at least one"),
    ],
)
def test_numbers_and_names_are_checked(group, values, message):
    with pytest.raises(ConfigError, match=rf"^config\.evaluation\.{message}"):
        tiny_config("corpus", **{f"evaluation__{group}": values})
