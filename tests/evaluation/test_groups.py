"""Every task of every group on rows of its data set: prompts, options, targets, metrics and settings."""

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from lm_eval.api.model import LM

from rat_jax.data.tokenizer import ByteTokenizer
from rat_jax.evaluation.groups import GROUPS
from rat_jax.evaluation.harness_tasks import Tasks
from rat_jax.evaluation.text_settings import TextSettings
from tests.evaluation.task_data import CASES, CHOICES, GENERATED, LAMBADA

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
