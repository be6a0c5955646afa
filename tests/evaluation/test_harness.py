"""Tasks of the lm-evaluation-harness: exact numbers on a model whose distribution is known, and what can go wrong."""

import functools
import json
import shutil

import numpy as np
import pytest
from flax import nnx
from lm_eval.api.instance import Instance

from rat_jax.checkpoints.model_workdir import save_model
from rat_jax.data.tokenizer import ByteTokenizer, train_bpe
from rat_jax.evaluation import EvaluationError, harness, harness_tasks
from rat_jax.evaluation.harness import HarnessModel
from rat_jax.evaluation.harness_tasks import Tasks, run_tasks
from rat_jax.evaluation.task_report import table
from rat_jax.evaluation.text_settings import TextSettings
from rat_jax.model import LanguageModel
from rat_jax.sampling import generate_text
from tests.commands import call_script
from tests.full_disk import fill_disk
from tests.small import bigram_model
from tests.tiny_run import make_corpus, tiny_config

TOKENIZER = ByteTokenizer()
END = TOKENIZER.eos_id
QUESTIONS = [
    {"question": "Is it warm?", "options": ["yes", "no", "größer 日本"], "answer": 0},
    {"question": "A long one " * 5, "options": ["b", " c ", "d"], "answer": 1},
    {"question": "?", "options": ["x", "yy", "zzz"], "answer": 2},
]
TEXTS = [{"text": "one short text"}, {"text": "a text of more than the context length. " * 4}]
PROMPTS = [{"question": "Q: a\nA:", "answer": "x"}, {"question": "bb", "answer": "y"}]


def write_task(folder, name, rows, **config):
    (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    values = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "metadata": {"version": 1.0},
    }
    (folder / f"{name}.yaml").write_text(json.dumps(values | config))  # JSON is YAML


def metric(name, **more):
    return {"metric": name, "aggregation": "mean", "higher_is_better": True} | more


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files of every kind of request, and some that fail."""
    folder = tmp_path_factory.mktemp("tasks")
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "answer",
        "metric_list": [metric("acc"), metric("acc_norm")],
    }
    write_task(folder, "choice", QUESTIONS, **choice)
    write_task(folder, "wrong_column", QUESTIONS, **choice | {"doc_to_text": "{{no_such}}"})
    write_task(folder, "no_file", QUESTIONS, **choice)
    (folder / "no_file.jsonl").unlink()
    (folder / "needs.py").write_text("import no_such_package\n\ndef text(doc):\n    return doc['question']\n")
    (folder / "divides.py").write_text("def text(doc):\n    return str(1 // len(doc['question'].strip('?')))\n")
    for name, function in (("no_package", "needs.text"), ("divides", "divides.text")):
        write_task(folder, name, QUESTIONS, **choice)
        text = (folder / f"{name}.yaml").read_text()
        (folder / f"{name}.yaml").write_text(text.replace('"{{question}}"', f"!function {function}"))
    write_task(folder, "unknown_field", QUESTIONS, **choice, no_such_field=1)
    write_task(folder, "unknown_metric", QUESTIONS, **choice | {"metric_list": [metric("no_such_metric")]})
    write_task(folder, "no_label", [QUESTIONS[0] | {"answer": 7}], **choice)
    write_task(folder, "no_rows", [], **choice)
    write_task(folder, "no_json", QUESTIONS, **choice)
    (folder / "no_json.jsonl").write_text("text\n")
    write_task(
        folder,
        "rolling",
        TEXTS,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    )
    write_task(
        folder,
        "until",
        PROMPTS,
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n", ""], "max_gen_toks": 8, "do_sample": False, "top_p": 0.9, "num_beams": 1},
        metric_list=[metric("exact_match")],
    )
    return folder


@pytest.fixture(scope="module")
def bigrams():
    return bigram_model(vocab_size=257)


def make_model(bigrams, tokenizer=TOKENIZER, **settings):
    settings = TextSettings(**{"context_length": 64} | settings)
    return HarnessModel(bigrams[0], tokenizer, None, settings, batch_tokens=1024)


def log_prob(table, text: str, start: int) -> float:
    """log p of the bytes of a text after the id `start`."""
    ids = [start, *text.encode()]
    return table[ids[:-1], ids[1:]].sum()


def instances(kind, *arguments):
    return [Instance(kind, {}, args, index, ("t", index, 1)) for index, args in enumerate(arguments)]


def test_options_are_judged_by_their_probability(bigrams, folder):
    table = bigrams[1]
    right = right_norm = 0
    for row in QUESTIONS:
        # The harness writes a space between a question and its options, and moves spaces to the option.
        stem = row["question"].rstrip()
        spaces = row["question"][len(stem) :]
        totals = [log_prob(table, f"{spaces} {option}", stem.encode()[-1]) for option in row["options"]]
        per_character = [total / len(option) for total, option in zip(totals, row["options"], strict=True)]
        right += np.argmax(totals) == row["answer"]
        right_norm += np.argmax(per_character) == row["answer"]
    model = make_model(bigrams)
    found = Tasks(["choice"], folder).run("choice", model, num_fewshot=None, limit=None)
    assert found["results"]["choice"]["acc,none"] == pytest.approx(right / 3)
    assert found["results"]["choice"]["acc_norm,none"] == pytest.approx(right_norm / 3)
    assert found["n-samples"]["choice"] == {"original": 3, "effective": 3}
    assert found["num_truncated"] == 0


def test_texts_in_windows(bigrams, folder):
    found = Tasks(["rolling"], folder).run("rolling", make_model(bigrams), num_fewshot=None, limit=None)
    texts = [row["text"] for row in TEXTS]
    nats = sum(log_prob(bigrams[1], text, END) for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert found["results"]["rolling"]["bits_per_byte,none"] == pytest.approx(-nats / np.log(2) / num_bytes, rel=1e-5)


def test_generated_texts(bigrams, folder):
    model = make_model(bigrams)
    found = Tasks(["until"], folder).run("until", model, num_fewshot=None, limit=1)
    assert found["results"]["until"]["exact_match,none"] in (0.0, 1.0)
    assert found["n-samples"]["until"]["effective"] == 1
    # What follows each byte is the likeliest one.
    table = bigrams[1]
    want, last = b"", ord("b")
    for _ in range(8):
        last = int(table[last].argmax())
        want += bytes([last])
    arguments = {"until": ["\n\n"], "max_gen_toks": 8}
    whole, stopped = model.generate_until(
        instances(
            "generate_until", ("ab", arguments), ("cb", arguments | {"until": [want.decode(errors="replace")[2]]})
        )
    )
    assert whole == want.decode(errors="replace")
    assert stopped == whole[: whole.index(whole[2])]


def test_numbers_of_single_requests(bigrams):
    table = bigrams[1]
    model = make_model(bigrams)
    pairs = [("a", "b"), ("a ", "b"), ("", "bc"), ("a", "日本"), (" ", "b")]
    want = [
        log_prob(table, "b", ord("a")),
        log_prob(table, " b", ord("a")),  # the space belongs to the continuation
        log_prob(table, "bc", END),
        log_prob(table, "日本", ord("a")),
        log_prob(table, " b", END),
    ]
    found = model.loglikelihood(instances("loglikelihood", *pairs))
    np.testing.assert_allclose([total for total, _ in found], want, rtol=1e-5)
    likeliest = int(table[ord("a"), :128].argmax())
    ((_, greedy),) = model.loglikelihood(instances("loglikelihood", ("a", chr(likeliest))))
    assert greedy == (likeliest == table[ord("a")].argmax())
    assert model.loglikelihood_rolling(instances("loglikelihood_rolling", ("",))) == [0.0]
    apart = make_model(bigrams, joint_tokenization=False)
    ((total, _),) = apart.loglikelihood(instances("loglikelihood", ("a ", "b")))
    assert total == pytest.approx(log_prob(table, "b", ord(" ")), rel=1e-5)


def test_joint_tokenisation_cuts_where_the_context_ends(bigrams):
    bpe = train_bpe(["the cat sat on the mat, the cat sat on the hat"], 270)
    joint, apart = (make_model(bigrams, bpe, joint_tokenization=value) for value in (True, False))
    context, continuation = "the cat", " sat on the mat"
    whole = bpe.encode(context + continuation)
    assert joint._encode_pair(context + " ", continuation[1:]) == (
        bpe.encode(context),
        whole[len(bpe.encode(context)) :],
    )
    assert apart._encode_pair(context + " ", continuation[1:]) == (bpe.encode("the cat "), bpe.encode(continuation[1:]))


@pytest.mark.parametrize(
    ("settings", "context", "room", "want"),
    [
        ({}, [1, 2, 3], 3, [1, 2, 3]),
        ({}, [1, 2, 3, 4, 5], 3, [3, 4, 5]),
        ({"truncation": "right"}, [1, 2, 3, 4, 5], 3, [1, 2, 3]),
        ({"truncation": "middle"}, [1, 2, 3, 4, 5, 6], 3, [1, 5, 6]),
        ({"truncation": "middle"}, [1, 2, 3], 1, [3]),
        ({}, [], 3, [END]),
        ({"bos": "always"}, [1, 2], 3, [END, 1, 2]),
        ({"bos": "always"}, [END], 3, [END]),
        ({"bos": "always"}, [1, 2, 3, 4, 5], 3, [END, 4, 5]),
        ({"bos": "always", "truncation": "right"}, [1, 2, 3, 4], 3, [END, 1, 2]),
        ({"bos": "always"}, [1, 2], 1, [END]),
    ],
)
def test_contexts_are_cut_to_their_room(bigrams, settings, context, room, want):
    model = make_model(bigrams, **settings)
    assert model._fitted(context, room) == want
    assert model.num_truncated == (len(want) < len(context) + (END in want and END not in context and context != []))


@pytest.mark.parametrize(("truncation", "last"), [("left", "j"), ("right", "g"), ("middle", "j")])
def test_a_context_too_long_leaves_room_for_the_continuation(bigrams, truncation, last):
    model = make_model(bigrams, context_length=8, truncation=truncation)
    ((total, _),) = model.loglikelihood(instances("loglikelihood", ("abcdefghij", "kl")))
    assert total == pytest.approx(log_prob(bigrams[1], "kl", ord(last)), rel=1e-5)
    assert model.num_truncated == 1


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({}, "ghij"),
        ({"truncation": "right"}, "abcd"),
        ({"truncation": "middle"}, "abij"),
        ({"bos": "always"}, [END, *b"hij"]),
    ],
)
def test_a_prompt_too_long_leaves_room_for_what_is_generated(bigrams, monkeypatch, settings, want):
    given = []

    def generate(model, tokenizer, prompts, **settings):
        given.extend(prompts)
        return generate_text(model, tokenizer, prompts, **settings)

    monkeypatch.setattr(harness, "generate_text", generate)
    model = make_model(bigrams, context_length=8, **settings)
    arguments = {"until": [], "max_gen_toks": 4}
    long, short = model.generate_until(instances("generate_until", ("abcdefghij", arguments), ("j", arguments)))
    assert given[0] == list(want if isinstance(want, list) else want.encode())
    assert model.num_truncated == 1
    if given[0][-1] == ord("j"):
        assert long == short


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"until": ["\n"], "max_gen_toks": 64},
            "task t generates up to 64 tokens, which leave no room .* length of 64",
        ),
        ({"until": [], "num_beams": 4}, "generation_kwargs have num_beams, which is not supported"),
        (
            {"until": [], "max_gen_toks": 4, "typical_p": 0.5},
            "generation_kwargs have typical_p, which is not supported",
        ),
        ({"until": 5, "max_gen_toks": 4}, r"generation_kwargs have until: \[5\]: it must be "),
        ({"until": [], "max_gen_toks": "many"}, "generation_kwargs have a value of another type: .*'many'"),
        (
            {"until": [], "max_gen_toks": 4, "temperature": 1.0, "top_k": 2.5},
            r"generation_kwargs have top_k: 2\.5: it must be a whole number",
        ),
        (
            {"until": [], "max_gen_toks": 4, "temperature": 1.0, "top_p": "x"},
            "generation_kwargs have top_p: 'x': it must be a finite number",
        ),
    ],
)
def test_generation_that_is_not_possible(bigrams, arguments, message):
    with pytest.raises(EvaluationError, match=message):
        make_model(bigrams, max_new_tokens=5).generate_until(instances("generate_until", ("a", arguments)))


def test_requests_and_settings_that_make_no_sense(bigrams):
    with pytest.raises(EvaluationError, match="the continuation has 9 tokens, more than the context length of 8"):
        make_model(bigrams, context_length=8).loglikelihood(instances("loglikelihood", ("a", "b" * 9)))
    with pytest.raises(EvaluationError, match="task t, document 0: the continuation is empty"):
        make_model(bigrams).loglikelihood(instances("loglikelihood", ("a", "")))
    with pytest.raises(EvaluationError, match="bos must be one of empty, always, got 'never'"):
        TextSettings(64, bos="never")
    with pytest.raises(EvaluationError, match="truncation must be one of left, middle, right, got 'none'"):
        TextSettings(64, truncation="none")
    with pytest.raises(EvaluationError, match="max_new_tokens must be 1 or more, got 0"):
        TextSettings(64, max_new_tokens=0)


@pytest.fixture
def own_tasks_only(monkeypatch):
    """The harness's own task files take many seconds to read."""
    monkeypatch.setattr(harness_tasks, "TaskManager", functools.partial(OwnTaskManager))


class OwnTaskManager(harness_tasks.TaskManager):
    def __init__(self, include_path=None, include_defaults=False):
        super().__init__(include_path=include_path, include_defaults=False)


@pytest.mark.usefixtures("own_tasks_only")
def test_names_that_are_not_known(folder, tmp_path):
    with pytest.raises(EvaluationError, match=r"there is no task 'choise' .*; did you mean choice\?"):
        Tasks(["choice", "choise"], folder)
    with pytest.raises(EvaluationError, match=r"there is no folder .*/missing of task files"):
        Tasks(["choice"], tmp_path / "missing")
    with pytest.raises(EvaluationError, match="name one or several different tasks, got choice, choice"):
        Tasks(["choice", "choice"], folder)


def test_one_failing_task_does_not_lose_the_others(bigrams, folder):
    done = {}
    run_tasks(
        Tasks(["no_file", "choice", "wrong_column", "no_package"], folder),
        lambda name: make_model(bigrams),
        num_fewshot=0,
        limit=2,
        on_result=done.__setitem__,
    )
    assert list(done) == ["no_file", "choice", "wrong_column", "no_package"]
    assert "acc,none" in done["choice"]["results"]["choice"]
    assert done["no_package"] == {
        "error": "task no_package needs a package that is not installed: No module named 'no_such_package'"
    }
    message = done["no_file"]["error"]
    assert message.startswith(
        f"task no_file: the data set json ({{'test': '{folder}/no_file.jsonl'}}) cannot be loaded: "
    )
    assert message.endswith("; put the files there, or mend dataset_kwargs in the task's file")
    assert "\n" not in message
    assert done["wrong_column"]["error"].startswith("task wrong_column does not fit the data set json")
    assert "'no_such' is undefined" in done["wrong_column"]["error"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divides", "does not fit the data set json .*: ZeroDivisionError: .* by zero; compare its file with"),
        ("unknown_field", "does not fit the data set .*: TypeError: .* 'no_such_field'; compare its file with"),
        ("no_label", "does not fit the data set json .*: IndexError: list index out of range; compare its file with"),
        ("no_rows", "the data set json .* cannot be loaded: a file is empty; put the files there, or mend"),
        ("no_json", "the data set json .* cannot be loaded: An error .*: JSON parse error: Invalid value.*; put the"),
    ],
)
def test_tasks_and_data_that_are_wrong(bigrams, folder, name, message):
    """Whatever the code of others raises: two rows of `divides` are good."""
    with pytest.raises(EvaluationError, match=f"^task {name}:? {message}"):
        Tasks([name], folder).run(name, make_model(bigrams), num_fewshot=None, limit=None)


def test_a_task_without_a_figure_is_no_result(bigrams, folder, monkeypatch):
    monkeypatch.setattr("lm_eval.api.registry.get_metric", lambda *arguments: None)  # it would ask a server
    monkeypatch.setattr("lm_eval.api.task.get_metric", lambda *arguments: None)
    with pytest.raises(EvaluationError, match="task unknown_metric: nothing of unknown_metric was measured: its file"):
        Tasks(["unknown_metric"], folder).run("unknown_metric", make_model(bigrams), num_fewshot=None, limit=None)


def test_faults_of_this_package_are_not_taken_for_those_of_a_task(bigrams, folder, monkeypatch):
    def fail(*arguments, **settings):
        raise TypeError("ours")

    model = make_model(bigrams)
    monkeypatch.setattr(model._scorer, "score", fail)
    with pytest.raises(TypeError, match="ours"):
        Tasks(["choice"], folder).run("choice", model, num_fewshot=None, limit=None)


@pytest.mark.parametrize(
    ("of_file", "asked", "shown", "ignored"), [(0, 1, 0, True), (None, 1, 1, False), (0, 0, 0, False)]
)
def test_examples_that_a_task_does_not_show(bigrams, folder, tmp_path, of_file, asked, shown, ignored):
    text = json.loads((folder / "choice.yaml").read_text()) | {"task": "few", "fewshot_split": "test"}
    (tmp_path / "few.yaml").write_text(json.dumps(text | {"num_fewshot": of_file}))
    found = Tasks(["few"], tmp_path).run("few", make_model(bigrams), num_fewshot=asked, limit=1)
    assert found["n-shot"] == {"few": shown}
    assert found.get("without_examples", []) == ["few"] * ignored
    line = "few                              --num_fewshot has no effect: the task's file says 0"
    assert (line in table({"few": found}, header=True).splitlines()) == ignored


def test_data_that_cannot_be_downloaded(folder, monkeypatch, tmp_path):
    def refuse(*arguments, **settings):
        raise ConnectionError("Couldn't reach 'owner/data' on the Hub")

    write_task(tmp_path, "remote", QUESTIONS, dataset_path="owner/data", dataset_name="part", dataset_kwargs={})
    tasks = Tasks(["remote"], tmp_path)
    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(
        EvaluationError,
        match=r"task remote: the data set owner/data part cannot .* reach .* huggingface\.co/datasets/owner/data: ",
    ):
        tasks.load("remote")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, bigrams):
    folder = tmp_path_factory.mktemp("harness") / "run"
    config = tiny_config("nowhere", model__pattern=("rnn",), model__vocab_size=257)
    save_model(folder, config, LanguageModel(config.model, rngs=nnx.Rngs(0)), step=3, tokenizer=TOKENIZER)
    return folder


def test_the_program(workdir, folder, capsys, monkeypatch):
    arguments = ["--workdir", workdir, "--tasks_dir", folder, "--context_lengths=48", "--limit=2"]
    assert call_script("eval.py", *arguments, "--tasks=choice,until") == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[:3] for line in lines[:3]] == [
        ["task", "metric", "documents"],
        ["choice", "acc", "2"],
        ["choice", "acc_norm", "2"],
    ]
    assert lines[3].split() == ["choice", "3", "contexts", "were", "too", "long", "and", "cut"]
    assert lines[4].split()[:3] == ["until", "exact_match", "2"]
    (file,) = workdir.glob("tasks-3-choice_until-*.json")
    assert f"written to {file}\ntimes: imports " in printed.err
    values = json.loads(file.read_text())
    measured = values["measured"]
    assert (measured["bos"], measured["truncation"], measured["joint_tokenization"]) == ("empty", "left", True)
    assert (measured["context_length"], measured["limit"], measured["num_fewshot"]) == (48, 2, None)
    assert measured["tokenizer_hash"] == TOKENIZER.hash
    assert values["step"] == 3
    assert values["tasks"]["choice"]["versions"] == {"choice": 1.0}

    assert call_script("eval.py", *arguments, "--tasks=choice,no_file", "--bos=always", "--json") == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["tasks"].keys() == {"choice", "no_file"}
    assert printed.err.splitlines()[-1].startswith("error: 1 of 2 tasks failed: task no_file: the data set json")
    assert len(list(workdir.glob("tasks-*.json"))) == 2

    def interrupt(tasks, name, *rest, **settings):
        if name == "until":
            raise KeyboardInterrupt
        return {"results": {}, "n-samples": {}, "num_truncated": 0, "num_left_out": 0}

    monkeypatch.setattr(Tasks, "run", interrupt)
    assert call_script("eval.py", *arguments, "--tasks=choice,until") == 1
    assert capsys.readouterr().err.endswith("error: only choice of the tasks is done: interrupted\n")
    after = json.loads(file.read_text())["tasks"]
    assert after["choice"]["results"] == {} and after["until"] == values["tasks"]["until"]  # of the command before
    fill_disk(monkeypatch, file.name)
    assert call_script("eval.py", *arguments, "--tasks=choice,until") == 1
    assert f"only choice of the tasks is done: {file}" in capsys.readouterr().err
    file.unlink()
    file.mkdir()
    assert call_script("eval.py", *arguments, "--tasks=choice,until") == 2  # before the work
    assert f"error: {file}" in capsys.readouterr().err
    file.rmdir()
    file.write_text("{")
    assert call_script("eval.py", *arguments, "--tasks=choice,until") == 2
    assert f"error: {file} is damaged" in capsys.readouterr().err
    monkeypatch.undo()

    moved = shutil.copytree(folder, folder.parent / "moved")
    arguments[3] = moved
    assert call_script("eval.py", *arguments, "--tasks=choice,until") == 2  # the same tasks: the file that is damaged
    assert f"error: {file} is damaged" in capsys.readouterr().err
    arguments[3] = folder

    other = make_corpus(folder.parent / "other", vocab_size=257)
    assert call_script("eval.py", *arguments, "--tasks=choice", "--data_path", other) == 2
    assert f"error: {other} was made by another tokenizer than the model's" in capsys.readouterr().err

    assert call_script("eval.py", *arguments, "--tasks=no_file") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: task no_file: the data set json")
    assert len(list(workdir.glob("tasks-*.json"))) == 2
