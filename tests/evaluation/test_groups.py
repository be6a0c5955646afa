"""Every task of every group on rows of its data set: prompts, options, targets, metrics and settings."""

import json

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from flax import nnx
from lm_eval.api.model import LM
from lm_eval.tasks.fda.task import FDA

from rat_jax.checkpoints.model_workdir import save_model
from rat_jax.data.tokenizer import ByteTokenizer
from rat_jax.evaluation import EvaluationError, harness_tasks
from rat_jax.evaluation.groups import GROUPS
from rat_jax.evaluation.harness import HarnessModel
from rat_jax.evaluation.harness_tasks import Tasks
from rat_jax.evaluation.tasks import recall_prompts
from rat_jax.evaluation.text_settings import TextSettings
from rat_jax.model import LanguageModel
from tests.commands import call_script
from tests.evaluation.task_data import CASES, CHOICES, GENERATED, LAMBADA
from tests.small import bigram_model
from tests.tiny_run import tiny_config

TOKENIZER = ByteTokenizer()
TABLE = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)  # log p(byte | the byte before it)


class Oracle(LM):
    """A model whose distribution is `TABLE`, that generates what a case says, and keeps what it is asked."""

    def __init__(self, context_length: int = 2048):
        super().__init__()
        self.tokens = TOKENIZER
        self.settings = TextSettings(context_length)
        self.num_truncated = 0
        self.asked: list[tuple] = []
        self.answers = {
            document.prompt: document.generated for case in GENERATED.values() for document in case.documents
        }

    def loglikelihood(self, requests):
        self.asked += [request.args for request in requests]
        return [(log_prob(*request.args), is_likeliest(*request.args)) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        self.asked += [request.args for request in requests]
        return [self.answers[request.args[0]] for request in requests]


def log_prob(context: str, continuation: str) -> float:
    ids = [context.encode()[-1], *continuation.encode()]
    return float(TABLE[ids[:-1], ids[1:]].sum())


def is_likeliest(context: str, continuation: str) -> bool:
    ids = [context.encode()[-1], *continuation.encode()]
    return bool((TABLE[ids[:-1]].argmax(axis=-1) == ids[1:]).all())


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Data sets of the hub as files here: the rows of a case in the split that is asked, one row in the others."""

    def load(path, name=None, **settings):
        (case,) = {id(case): case for task, case in CASES.items() if case.dataset == (path, name)}.values()
        splits = {}
        for split in ("train", "validation", "test"):
            rows = case.rows if split == case.split else case.rows[:1]
            file = tmp_path / f"{split}.parquet"
            datasets.Dataset.from_list(rows).to_parquet(file)
            splits[split] = datasets.Dataset(pyarrow.parquet.read_table(file))
        return datasets.DatasetDict(splits)

    monkeypatch.setattr("datasets.load_dataset", load)


def groups_of(task: str) -> list[str]:
    return [name for name, group in GROUPS.items() if task in [task.name for task in group.tasks]]


def run(task: str, oracle: Oracle) -> dict:
    group = groups_of(task)[0]
    return Tasks([group]).run(task, oracle, num_fewshot=GROUPS[group].num_fewshot, limit=None)


def test_every_task_of_every_group_has_rows():
    assert {task.name for group in GROUPS.values() for task in group.tasks} == set(CASES)
    assert all(len(case.rows) >= 3 for case in CASES.values())
    assert [len(group.tasks) for group in GROUPS.values()] == [6, 10, 14, 6]


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", CHOICES)
def test_options(name):
    oracle = Oracle()
    found = run(name, oracle)
    documents = CHOICES[name].documents
    assert sorted(oracle.asked) == sorted(request for document in documents for request in document.requests)
    totals = [[log_prob(*request) for request in document.requests] for document in documents]
    right = [np.argmax(total) == document.right for total, document in zip(totals, documents, strict=True)]
    assert found["results"][name]["acc,none"] == pytest.approx(np.mean(right))
    if "acc_norm,none" in found["results"][name]:
        per_character = [
            np.divide(total, [len(option) for option in document.options])
            for total, document in zip(totals, documents, strict=True)
        ]
        right = [np.argmax(value) == document.right for value, document in zip(per_character, documents, strict=True)]
        assert found["results"][name]["acc_norm,none"] == pytest.approx(np.mean(right))
    assert found["n-samples"][name] == {"original": 3, "effective": 3}
    assert found["n-shot"][name] == 0


@pytest.mark.usefixtures("hub")
def test_last_words(monkeypatch):
    # One text ends as the model would: after a space comes "c".
    monkeypatch.setitem(globals(), "TABLE", TABLE.copy())
    TABLE[ord("b"), ord(" ")] = TABLE[ord(" "), ord("c")] = 9.0
    oracle = Oracle()
    found = run("lambada_openai", oracle)["results"]["lambada_openai"]
    requests = [request for document in LAMBADA.documents for request in document.requests]
    assert oracle.asked == requests
    assert found["acc,none"] == np.mean([is_likeliest(*request) for request in requests])
    mean = np.mean([log_prob(*request) for request in requests])
    assert found["perplexity,none"] == pytest.approx(np.exp(-mean))


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", GENERATED)
def test_answers(name):
    oracle = Oracle()
    found = run(name, oracle)
    case = GENERATED[name]
    assert [prompt for prompt, _ in oracle.asked] == [document.prompt for document in case.documents]
    for _, settings in oracle.asked:
        assert tuple(settings["until"]) == case.until
        assert settings["max_gen_toks"] == case.max_gen_toks
        assert settings["do_sample"] is False
    (metric,) = (task.metric for task in GROUPS[groups_of(name)[0]].tasks if task.name == name)
    want = np.mean([document.value for document in case.documents])
    assert found["results"][name][f"{metric},none"] == pytest.approx(want, abs=1e-6)
    assert found["num_left_out"] == len(case.rows) - len(case.documents)


def test_what_is_asked_for_stays_where_the_harness_cuts_it_away():
    """The trap of the harness's own fda: a long report whole, of which the model reads the end."""
    row = {"key": "applicant", "value": "Acme Inc.", "text": f"It was sent to us by Acme Inc. {'Nothing. ' * 400}"}
    (task,) = (task for task in GROUPS["recall"].tasks if task.name == "recall_fda")
    prompt = recall_prompts.fda_prompt(task.cut.apply(row, TOKENIZER, 2048))
    room = 2048 - 48
    assert len(prompt) <= 2048
    assert "Acme" in prompt[-room:]
    assert prompt.endswith(". Applicant:")
    assert "Acme" not in FDA.doc_to_text(None, row)[-room:]


@pytest.mark.parametrize("num_tokens", [3000, 4030, 4031, 4032, 4033, 9000])
def test_longbench_contexts_are_cut_in_the_middle_as_the_release_does(num_tokens):
    settings = TextSettings(**GROUPS["longbench"].text)
    model = HarnessModel(bigram_model()[0], TOKENIZER, None, settings, batch_tokens=1)
    ids = list(range(num_tokens))
    room = settings.context_length - 64
    first, last = (4096 - 64 - 1) // 2, 4096 - 64 - 1 - (4096 - 64 - 1) // 2
    assert model._fitted(ids, room) == (ids[:first] + ids[-last:] if num_tokens >= 4096 - 64 else ids)


def test_a_task_by_itself_is_the_harnesss(hub):
    def template(names, task):
        return Tasks(names).load(task)["tasks"][task].config

    ours = template(["longbench"], "longbench_trec")
    theirs = template(["longbench_trec"], "longbench_trec")
    assert (ours.generation_kwargs["until"], theirs.generation_kwargs["until"]) == ([], ["\n"])
    assert Tasks(["recall_fda"]).group_of("recall_fda") is GROUPS["recall"]
    assert Tasks(["longbench_trec"]).group_of("longbench_trec") is None


def test_a_prompt_that_the_harness_has_changed_is_refused(hub, tmp_path):
    (tmp_path / "lcc.yaml").write_text(
        json.dumps(
            {"task": "longbench_lcc", "dataset_path": "json", "doc_to_text": "{{context}}", "test_split": "test"}
        )
    )
    with pytest.raises(
        EvaluationError, match=r"longbench_lcc: the prompt '\{\{context\}\}' of its file has not 'Next line"
    ):
        Tasks(["longbench"], tmp_path).load("longbench_lcc")


def test_data_that_cannot_be_downloaded_is_named_with_its_place(monkeypatch):
    def refuse(*arguments, **settings):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    for group in GROUPS:
        tasks = Tasks([group])
        for name in tasks.names:
            path, part = CASES[name].dataset
            with pytest.raises(EvaluationError) as error:
                tasks.load(name)
            message = str(error.value)
            assert (
                f"task {name}: the data set {path}{f' {part}' if part else ''} cannot be loaded: no network" in message
            )
            assert f"huggingface.co/datasets/{path}: " in message
            assert "HF_HOME" in message and "--tasks_dir" in message


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["csr", "piqa"], "name one or several different tasks, got piqa, arc_easy, .*, piqa"),
        (["csr", "csr_hybrid"], "name one or several different tasks"),
        ([], "got none"),
    ],
    ids=str,
)
def test_tasks_named_twice(names, message):
    with pytest.raises(EvaluationError, match=message):
        Tasks(names)


def test_near_names_of_groups_are_offered(monkeypatch):
    # The harness's thousands of files take many seconds to read.
    monkeypatch.setattr(harness_tasks, "TaskManager", OwnTaskManager)
    with pytest.raises(EvaluationError, match=r"there is no task 'recal' .*; did you mean recall"):
        Tasks(["recal"])


class OwnTaskManager(harness_tasks.TaskManager):
    def __init__(self, include_path=None, include_defaults=False):
        super().__init__(include_path=include_path, include_defaults=False)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups") / "run"
    config = tiny_config("nowhere", model__pattern=("rnn",), model__vocab_size=257)
    save_model(folder, config, LanguageModel(config.model, rngs=nnx.Rngs(0)), step=3, tokenizer=TOKENIZER)
    return folder


def test_the_program_on_a_group(workdir, hub, monkeypatch, capsys):
    made = []

    def make(model, tokenizer, mesh, settings, **rest):
        made.append(Oracle())
        made[-1].settings = settings
        return made[-1]

    monkeypatch.setattr("rat_jax.evaluation.harness.HarnessModel", make)
    assert call_script("eval.py", "--workdir", workdir, "--tasks=recall,sciq", "--truncation=right") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "metric", "documents", "value", "stderr"]
    assert lines[1].split()[:4] == ["recall_swde", "contains", "3", "0.6667"]
    assert lines[2] == f"{'recall_swde':<32} 1 document is left out by the protocol"
    mean = np.mean([2 / 3, 1 / 3, 2 / 3, 2 / 3, 2 / 3, 2 / 3])
    assert lines[-1] == f"{'recall':<32} mean of 6 tasks {mean:.4f}"
    assert [model.settings.context_length for model in made] == [2048, 16]  # of the group, and of the training

    (file,) = workdir.glob("tasks-3-recall_sciq-*.json")
    values = json.loads(file.read_text())
    group = values["measured"]["groups"]["recall"]
    assert (group["context_length"], group["truncation"], group["num_fewshot"]) == (2048, "right", 0)
    assert group["metrics"] == {
        f"recall_{name}": "contains" for name in ("swde", "squad", "fda", "triviaqa", "nq", "drop")
    }
    assert "2407.05483" in group["source"]
    assert values["measured"]["context_length"] == 16
    assert values["group_means"] == {"recall": pytest.approx(mean)}
    assert values["tasks"]["recall_fda"]["settings"] == {
        "context_length": 2048,
        "bos": "empty",
        "truncation": "right",
        "joint_tokenization": True,
        "max_new_tokens": 256,
    }
    assert values["tasks"]["sciq"]["settings"]["context_length"] == 16

    # The command's own length goes before the group's; a task that fails takes the mean with it.
    assert call_script("eval.py", "--workdir", workdir, "--tasks=recall", "--context_lengths=90", "--json") == 1
    printed = capsys.readouterr()
    assert "1 of 6 tasks failed: task recall_nq: a context length of 90 has no room" in printed.err
    values = json.loads(printed.out)
    assert values["measured"]["groups"]["recall"]["context_length"] == 90
    assert values["group_means"] == {"recall": None}
