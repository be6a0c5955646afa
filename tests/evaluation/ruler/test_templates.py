"""The sentences around the tasks."""

import dataclasses
import importlib.metadata
import importlib.util
import types

import pytest

from rat_jax.evaluation import EvaluationError
from rat_jax.evaluation.ruler import harness_templates as module
from rat_jax.evaluation.ruler.evaluation import find_templates
from rat_jax.evaluation.ruler.examples import make_example
from rat_jax.evaluation.ruler.harness_templates import harness_templates
from rat_jax.evaluation.ruler.templates import OWN, Template
from rat_jax.evaluation.ruler.words import GeneratedWords, PackageWords, find_words


@pytest.mark.parametrize(
    ("question", "prefix", "message"),
    [
        ("no text", "", "must hold {context} once"),
        ("{context} {context}", "", "must hold {context} once"),
        ("{context} {key}", "", "has the field {key}; known are {context}, {count}"),
        ("{context}", "{context}", "has the field {context}"),
        ("{context", "", "is no format string"),
    ],
)
def test_templates_that_cannot_be_filled(question, prefix, message):
    with pytest.raises(EvaluationError) as caught:
        Template(question, prefix)
    assert message in str(caught.value)


def test_a_needle_holds_key_and_value():
    with pytest.raises(EvaluationError, match=r"must hold \{key\} and \{value\}"):
        dataclasses.replace(OWN, needle="{key} is here")


def test_text_with_braces_stays_as_it_is():
    assert Template("<{context}>", "{kind}:").prompt("{query} {}", kind="number", query="k") == "<{query} {}> number:"


def test_names_of_templates_and_words():
    assert find_templates("own") is OWN
    with pytest.raises(EvaluationError, match="templates must be harness or own, got 'other'"):
        find_templates("other")
    assert isinstance(find_words("generated", official=True), GeneratedWords)
    assert isinstance(find_words(None, official=False), GeneratedWords)
    with pytest.raises(EvaluationError, match="words must be generated or wonderwords, got 'other'"):
        find_words("other", official=True)


def test_without_the_harness_its_templates_are_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match="lm-evaluation-harness, which is not installed: pip install -r"):
        harness_templates()
    with pytest.raises(EvaluationError, match="wonderwords need the package: pip install wonderwords"):
        find_words("wonderwords", official=False)
    assert isinstance(find_words(None, official=True), GeneratedWords)


# Files as the harness lays them out, with sentences of this test.
FILES = {
    "prepare_niah.py": """
import no_such_package
NEEDLE = "A {type_needle_v} for {key}: {value}."
def generate(kind, query, type_needle_v):
    return {
        "gen_prefix": f"One {type_needle_v[:-1]} for {query} is" if kind else f"The {type_needle_v} for {query} are",
    }
def get_haystack(kind):
    if kind == "essay":
        haystack = no_such_package.split(" ")
    elif kind == "repeat":
        haystack = "Noise."
    else:
        haystack = NEEDLE
    return haystack
""",
    "niah_utils.py": 'TEMPLATE = """Some {type_needle_v} are here. {context}\\n'
    'What are all {type_needle_v} for {query}?"""',
    "vt_utils.py": 'CONFIG = {"variable_tracking": {"template": "{context} {query}", "answer_prefix": " {num_v}: "}}',
    "cwe_utils.py": 'CONFIG = {"template": "cw {context}", "answer_prefix": " cwa"}',
    "fwe_utils.py": 'CONFIG = {"template": "fw {context}", "answer_prefix": " fwa"}',
}


@pytest.fixture
def harness_folder(tmp_path, monkeypatch):
    folder = tmp_path / "tasks" / "ruler"
    folder.mkdir(parents=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "0.4.99")
    return folder


def test_the_harness_s_files_are_read_and_not_imported(harness_folder):
    found = harness_templates()
    assert found.source.startswith("lm_eval 0.4.99, lm_eval/tasks/ruler")
    assert "Apache-2.0" in found.source
    assert (found.noise, found.needle) == ("Noise.", "A {kinds} for {key}: {value}.")
    assert found.one_needle.question == "A {kind} is here. {context}\nWhat is {kind} for {query}?"
    assert found.one_needle.prefix == "One {kind} for {query} is"
    assert found.several_needles.question == "Some {kinds} are here. {context}\nWhat are all {kinds} for {query}?"
    assert found.several_needles.prefix == "The {kinds} for {query} are"
    assert found.variables == Template("{context} {query}", "{count}:")
    assert found.common_words == Template("cw {context}", "cwa")
    assert found.coded_words == Template("fw {context}", "fwa")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("text", ["", "CONFIG = {}\nTEMPLATE = NEEDLE = 3", "def broken(", None])
def test_a_harness_of_another_layout_is_refused(harness_folder, name, text):
    if text is None:
        (harness_folder / name).unlink()
    else:
        (harness_folder / name).write_text(text)
    with pytest.raises(EvaluationError, match=r"lm_eval 0\.4\.99 lays out .* in a way that is not known here"):
        harness_templates()


def test_solved_examples_come_first_where_the_templates_have_them(tokenizers, settings, harness_folder):
    templates = dataclasses.replace(harness_templates(), noise=OWN.noise)
    for task, end in (("vt", r"5:"), ("cwe", "cwa")):
        example = make_example(task, 0, tokenizers["bpe"], settings(templates=templates, context_length=4096))
        solved, asked = (part.split("\n")[0] for part in example.prompt.split(end)[1:])
        assert asked == ""
        assert len(solved.split()) == (5 if task == "vt" else 20)
        assert not set(solved.split()) & set(example.answers)


def test_the_installed_harness_s_sentences(tokenizers, settings):
    pytest.importorskip("lm_eval", reason="needs requirements-eval.txt")
    templates = harness_templates()
    assert importlib.metadata.version("lm_eval") in templates.source
    example = make_example(
        "niah_multiquery", 0, tokenizers["bytes"], settings(templates=templates, context_length=4096)
    )
    assert example.prompt.startswith("Some special magic numbers are hidden within the following text.")
    assert example.prompt.endswith(" mentioned in the provided text are")
    single = make_example("niah_single_1", 0, tokenizers["bytes"], settings(templates=templates)).prompt
    assert single.startswith("A special magic number is hidden within the following text.")
    assert "One of the special magic numbers for" in single
    assert single.count("The grass is green.") > 10


def test_words_of_the_package(settings, tokenizers):
    pytest.importorskip("wonderwords", reason="a package that RULER's words come from")
    words = find_words(None, official=True)
    assert isinstance(words, PackageWords)
    assert words.source == f"wonderwords {importlib.metadata.version('wonderwords')}"
    assert len(words.listed) > 5000
    example = make_example("cwe", 0, tokenizers["bytes"], settings(words=words, context_length=8192))
    assert set(example.answers) <= set(words.listed)
