"""A model that is fine-tuned on nine examples answers eight of them, and what eval.py --sft says of it is right.

It starts from a file of the release. The ninth example is cut as no question is. Prompts that are longer than the
context are among the examples and the questions.
"""

import json
import math

import numpy as np
import pytest
from flax import nnx

from rat_jax.checkpoints.store import load_model
from rat_jax.config import MeshConfig
from rat_jax.data import DataError
from rat_jax.data.tokenizer import IdTokenizer
from rat_jax.evaluation import EvaluationError
from rat_jax.evaluation.answers import AnswerSettings, Metric, Questions, exact_match, predict, score, token_f1
from rat_jax.model import LanguageModel
from rat_jax.release import release_model_config, release_state_dict
from rat_jax.release.file import ReleaseFile, write_release_file
from rat_jax.sampling import generate
from rat_jax.sharding import make_mesh
from rat_jax.training import train
from tests.commands import call_script
from tests.tiny_run import tiny_config
from tests.tiny_sft import make_examples, number_records, write_lines

SEQ_LEN, MAX_NEW_TOKENS = 32, 8
SETTINGS = AnswerSettings(SEQ_LEN, MAX_NEW_TOKENS)
BATCH_TOKENS = 13 * SEQ_LEN  # all prompts together: one shape to compile
TOKENIZER = IdTokenizer(29, 0)
KNOWN = [*number_records(8, 16, 4, seed=0), *number_records(1, 100, 4, seed=1)]  # the last is cut
UNKNOWN = number_records(5, 120, 4, seed=2)
METRICS = [Metric("token_f1", token_f1), Metric("exact_match", exact_match)]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The workdir of a run that has seen the nine examples 120 times."""
    folder = tmp_path_factory.mktemp("tuned")
    corpus = make_examples(folder, KNOWN, UNKNOWN, tokenizer="ids:29:0", seq_len=SEQ_LEN, rows="padded")
    assert corpus.examples.splits["train"].num_cut == 1 and corpus.examples.splits["validation"].num_cut == 5
    config = tiny_config(
        corpus.path,
        model__pattern=("rat",),
        model__width=32,
        model__mlp_width=128,
        data__seq_len=SEQ_LEN,
        data__segment_documents=False,
        init__path=str(folder / "rat.pth"),
        optimizer__weight_decay=0.01,
        training__num_steps=120,
        training__validate_every_steps=120,
        training__checkpoint_every_steps=120,
        training__log_every_steps=40,
    )
    model = LanguageModel(config.model, rngs=nnx.Rngs(0))
    values = release_model_config(config.model, SEQ_LEN)
    write_release_file(folder / "rat.pth", ReleaseFile(release_state_dict(model), values, 9))
    assert train(config, folder / "run").finished
    return folder / "run"


@pytest.fixture(scope="module")
def asked(tuned):
    """The eight short examples that were learned, and five long documents that were not."""
    path = write_lines(tuned.parent / "asked.jsonl", [*KNOWN[:8], *UNKNOWN])
    return Questions.read(path, None, TOKENIZER, SETTINGS.room, None)


@pytest.fixture(scope="module")
def loaded(tuned):
    """As eval.py loads it."""
    return load_model(tuned, mesh=make_mesh(MeshConfig(data=-1, fsdp=1)))


@pytest.fixture(scope="module")
def answers(loaded, asked, tmp_path_factory):
    """The answers, and the file of them."""
    out = tmp_path_factory.mktemp("answers") / "out.jsonl"
    return predict(loaded, asked, TOKENIZER, SETTINGS, out, batch_tokens=BATCH_TOKENS), out


def references(questions):
    return [example.answers for example in questions.examples]


def test_what_was_learned_is_answered_to_the_letter(answers, asked):
    answers, out = answers
    assert score(answers[:8], references(asked)[:8], METRICS) == {"token_f1": 100, "exact_match": 100}
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["completion"] for line in lines] == answers
    assert [line["completion"].split() for line in lines[:8]] == [record["answer"].split() for record in KNOWN[:8]]
    assert [line["references"] for line in lines] == [[record["answer"]] for record in [*KNOWN[:8], *UNKNOWN]]


def test_long_documents_lose_their_middle_and_get_a_score(answers, asked, loaded):
    assert asked.num_cut == 5
    prompts = [[int(number) for number in record["prompt"].split()] for record in [*KNOWN[:8], *UNKNOWN]]
    half = (SEQ_LEN - MAX_NEW_TOKENS) // 2
    cut = [*prompts[:8], *(prompt[:half] + prompt[-half:] for prompt in prompts[8:])]
    assert asked.ids == cut
    expected = generate(loaded.model, cut, max_new_tokens=MAX_NEW_TOKENS, eos_id=0)
    assert [[int(number) for number in answer.split()] for answer in answers[0]] == expected
    scores = score(answers[0][8:], references(asked)[8:], METRICS)
    assert all(0 <= value < 100 for value in scores.values())


def test_a_longer_context_reads_whole_prompts(tuned, asked):
    questions = Questions.read(asked.path, None, TOKENIZER, 200, limit=10)
    assert questions.num_cut == 0
    assert [len(ids) for ids in questions.ids] == [len(r["prompt"].split()) for r in [*KNOWN[:8], *UNKNOWN][:10]]


def test_an_interrupted_evaluation_goes_on(answers, asked, loaded, tmp_path, monkeypatch):
    answers, out = answers
    lines = out.read_bytes().splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    made = []

    def generate_again(model, prompts, first, on_tokens, **settings):
        made.append(first)
        for index in reversed(range(first, len(prompts))):
            on_tokens(index, TOKENIZER.encode(answers[index]))
            on_tokens(index, [])

    monkeypatch.setattr("rat_jax.evaluation.answers.generate", generate_again)
    for _ in range(2):
        again = predict(loaded, asked, TOKENIZER, SETTINGS, tmp_path / "part.jsonl", batch_tokens=BATCH_TOKENS)
        assert again == answers
        assert (tmp_path / "part.jsonl").read_bytes() == b"".join(lines)
    assert made == [3]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"prompt": "", "answer": "1"}], r"a\.jsonl, line 1: prompt is empty: give it text"),
        ([{"prompt": "1", "answer": "1"}, {"prompt": "1"}], r"a\.jsonl, line 2: answer is missing"),
        ([{"prompt": "word", "answer": "1"}], r"a\.jsonl, line 1: this tokenizer reads token ids"),
        ([{"messages": [{"role": "assistant", "content": "1"}]}], "holds a chat, and there is no template"),
        ([], r"a\.jsonl holds no records with a prompt and an answer"),
    ],
    ids=["empty", "missing", "tokenizer", "chat", "nothing"],
)
def test_questions_that_cannot_be_asked(tuned, tmp_path, records, message):
    with pytest.raises((DataError, EvaluationError), match=message):
        Questions.read(write_lines(tmp_path / "a.jsonl", records), None, TOKENIZER, SETTINGS.room, None)


def test_a_limit_below_one(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "1", "answer": "1"}])
    with pytest.raises(EvaluationError, match="limit must be 1 or more, got 0"):
        Questions.read(path, None, TOKENIZER, SETTINGS.room, 0)


def test_no_room_for_a_prompt():
    with pytest.raises(EvaluationError, match="answers of up to 32 tokens leave no room for a prompt"):
        AnswerSettings(32, 32)
    with pytest.raises(EvaluationError, match="max_new_tokens must be 1 or more, got 0"):
        AnswerSettings(32, 0)


@pytest.mark.parametrize(
    ("answer", "reference", "f1", "exact"),
    [
        ("The cat, sat!", "a cat sat", 1, 1),
        ("cat sat", "sat cat", 1, 0),
        ("the big cat", "big dog", 1 / 2, 0),
        ("x x y", "x y y", 2 / 3, 0),
        ("", "cat", 0, 0),
        ("a", "the", 1, 1),  # nothing but articles on both sides
        ("one two three", "one", 2 * (1 / 3) / (1 / 3 + 1), 0),
    ],
)
def test_words_in_common(answer, reference, f1, exact):
    assert token_f1(answer, reference) == pytest.approx(f1)
    assert exact_match(answer, reference) == exact


def test_the_most_alike_reference_counts():
    found = score(["a b", "c"], [["x", "b"], ["d"]], METRICS)
    assert found == {"token_f1": 50, "exact_match": 50}


def test_eval_script(tuned, asked, answers, capsys):
    """As a user runs it: a table, the answers beside the references, and figures that follow from them."""
    pytest.importorskip("rouge_score")
    arguments = ["--workdir", tuned, f"--sft={asked.path}", f"--max_new_tokens={MAX_NEW_TOKENS}"]
    arguments += [f"--batch_tokens={BATCH_TOKENS}"]
    assert call_script("eval.py", *arguments) == 0
    said = capsys.readouterr()
    assert "answers to the 13 prompts of" in said.out and "5 of them cut in the middle to 24 tokens" in said.out
    (file,) = tuned.glob("answers-120-asked-*.json")
    values = json.loads(file.read_text())
    lines = [json.loads(line) for line in file.with_suffix(".jsonl").read_text().splitlines()]
    assert [line["completion"] for line in lines] == answers[0]
    matches = [line["completion"].split() in [text.split() for text in line["references"]] for line in lines]
    assert math.isclose(values["scores"]["exact_match"], 100 * sum(matches) / 13)
    assert 100 * 8 / 13 <= values["scores"]["rouge_l"] < 100
    assert call_script("eval.py", *arguments, "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == values and "13 of 13 answers are in" in said.err


def test_rouge_l():
    pytest.importorskip("rouge_score")
    from rat_jax.evaluation.answers import find_metrics

    rouge_l = find_metrics()[0].of
    answer, reference = "the cat sat on a mat", "the cat lay on the red mat"
    common = len(["the", "cat", "on", "mat"])  # the longest common subsequence of words
    assert np.isclose(rouge_l(answer, reference), 2 * common / (6 + 7))
    assert rouge_l("a", "a") == 1 and rouge_l("a", "b") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sft=x", "--tasks=y"], "--tasks and --sft are different measurements: give one at a time"),
        (["--sft=x", "--bos=always"], "--bos has no effect without --tasks"),
        (["--sft=x", "--batch_tokens=0"], "batch_tokens must be 1 or more, got 0"),
        (["--sft=x", "--context_lengths=8,16"], "--sft wants one context length, got 8, 16"),
    ],
)
def test_flags_of_other_measurements(flags, message, tmp_path, capsys):
    assert call_script("eval.py", "--workdir", tmp_path, *flags) == 2
    assert message in capsys.readouterr().err


def test_without_the_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    from rat_jax.evaluation.answers import find_metrics

    with pytest.raises(EvaluationError, match=r"rouge_score: pip install -r requirements-eval\.txt"):
        find_metrics()
