"""Texts that grow: what is kept of them, and what is printed."""

import json

import pytest

from rat_jax.data.tokenizer import ByteTokenizer
from rat_jax.sampling import completions
from rat_jax.sampling.completions import Completion, FileWriter, Printer
from rat_jax.sampling.output_file import OutputFile
from rat_jax.sampling.prompts import Prompt

BYTES = ByteTokenizer()
PROMPT = Prompt.of("é", "")


def make_completion(row: int = 0, stop: tuple = ()) -> Completion:
    return Completion(row, 0, PROMPT, BYTES.encode(PROMPT.text), BYTES, stop)


def test_a_single_text_is_printed_as_it_grows_by_whole_characters(capsys):
    completion, printer, shown = make_completion(), Printer(1, 1), []
    for ids in ([0xE2, 0x82], [0xAC, 0x21], [0xC3]):
        completion.add(ids, None, False)
        printer.grow(completion)
        shown.append(capsys.readouterr().out)
    completion.add([], None, True)
    printer.finish(completion)
    assert [*shown, capsys.readouterr().out] == ["é", "€!", "", "\ufffd\n"]


def test_what_may_begin_a_stop_string_is_not_printed_yet(capsys):
    completion, printer, shown = make_completion(stop=("\n\nQ", "ab")), Printer(1, 1), []
    for text in ("one\n", "\n", "a", "\n\n"):
        completion.add(BYTES.encode(text), None, False)
        printer.grow(completion)
        shown.append(capsys.readouterr().out)
    assert shown == ["éone", "", "\n\n", "a"]
    completion.add(BYTES.encode("Q"), None, False)
    assert completion.is_stopped
    completion.add([], None, True)
    printer.finish(completion)
    assert capsys.readouterr().out == "\n"


@pytest.mark.parametrize("size", [1, 3, 8])
def test_tokens_behind_a_stop_string_are_not_kept(size):
    ids, completion = BYTES.encode("one two"), make_completion(stop=("e t",))
    for start in range(0, len(ids), size):
        completion.add(ids[start : start + size], [float(-i) for i in ids[start : start + size]], False)
    assert (completion.text, completion.tokens) == ("on", BYTES.encode("one t"))
    assert completion.log_probs == [float(-i) for i in completion.tokens]


def test_a_file_has_no_room_while_many_texts_wait_for_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(completions, "HELD", 1)
    monkeypatch.setattr(completions, "HELD_PER_SLOT", 2)
    file = OutputFile(tmp_path / "texts.jsonl", [PROMPT] * 5)
    file.go_on({})
    with FileWriter(file, num_slots=1) as writer:
        rooms = []
        for row in (1, 2, 3, 0):
            completion = make_completion(row)
            completion.add(BYTES.encode(str(row)), None, True)
            writer.finish(completion)
            rooms.append(writer.has_room)
    assert rooms == [True, True, False, True]
    lines = (tmp_path / "texts.jsonl").read_text().splitlines()
    assert [json.loads(line)["completion"] for line in lines] == ["0", "1", "2", "3"]
    assert capsys.readouterr() == ("", "")
