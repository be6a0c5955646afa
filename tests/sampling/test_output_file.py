"""The file of completions: whole lines, in the order of the prompts or not, gone on with, never mixed with others."""

import json
import os

import pytest

from rat_jax.checkpoints.workdir import CheckpointError
from rat_jax.errors import RunStopped
from rat_jax.files import FileError
from rat_jax.sampling.output_file import OutputFile
from rat_jax.sampling.prompts import Prompt, PromptError

SETTINGS = {"step": 7, "temperature": 0.5, "top_k": None}
PROMPTS = [Prompt.of_record({"id": i, "prompt": text}, f"line {i}") for i, text in enumerate(("é", "b", "c"), start=1)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "texts.jsonl"


def finish(path, numbers, prompts=PROMPTS) -> bytes:
    output = OutputFile(path, prompts)
    output.go_on(SETTINGS)
    for number in numbers:
        output.write(number, prompts[number], f"text {number}\n")
    return path.read_bytes()


def test_lines_hold_all_fields_in_the_order_of_the_prompts(path):
    output = OutputFile(path, PROMPTS)
    assert (output.num_done, path.exists()) == (0, False)
    output.go_on(SETTINGS)
    done = []
    for number in (1, 0, 2):
        output.write(number, PROMPTS[number], f"text {number}\n")
        done.append(output.num_done)
    assert done == [0, 2, 3]
    assert output.completions == OutputFile(path, PROMPTS).completions == ["text 0\n", "text 1\n", "text 2\n"]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        prompt.fields | {"completion": f"text {i}\n", "sampling": SETTINGS} for i, prompt in enumerate(PROMPTS)
    ]


def test_it_goes_on_from_every_byte_at_which_a_kill_may_have_cut_it(path):
    whole = finish(path, range(3))
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        done = OutputFile(path, PROMPTS).num_done
        assert done == whole[:size].count(b"\n")
        assert path.read_bytes() == whole[:size]  # until there is something to write
        assert finish(path, reversed(range(done, 3))) == whole


def test_equal_prompts_have_a_line_each(path):
    """Also where equal lines stand in the file."""
    prompts = [Prompt.of("a", "line 1"), Prompt.of("a", "line 2"), Prompt.of("b", "line 3")]
    whole = finish(path, range(3), prompts)
    first, second, _ = whole.splitlines(True)
    assert (json.loads(first)["completion"], json.loads(second)["completion"]) == ("text 0\n", "text 1\n")
    path.write_bytes(first + first)
    assert OutputFile(path, prompts).num_done == 2
    path.write_bytes(first)
    assert finish(path, [1, 2], prompts) == whole


def test_other_settings_are_refused(path):
    finish(path, [0])
    output = OutputFile(path, PROMPTS)
    with pytest.raises(PromptError, match=r"line 1, was made with other settings: temperature was 0\.5, is 0\.7; set"):
        output.go_on(SETTINGS | {"temperature": 0.7})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"precious", "line 1: is no beginning of a completion"),
        (lambda content: b"precious\n", "line 1: is not JSON"),
        (lambda content: b"\xff\n", "line 1: is not text"),
        (lambda content: b"3\n", "line 1: is no completion of line 1"),
        (lambda content: b"\n" + content, "line 1: is not JSON"),
        (lambda content: content.replace(b'"id": 2', b'"id": 3'), "line 2: is no completion of line 2"),
        (lambda content: content.replace(b"completion", b"complexion"), "line 1: is no completion of line 1"),
        (lambda content: b"".join(content.splitlines(True)[1:]), "line 1: is no completion of line 1"),
        (lambda content: content + content, "line 4: there are only 3 prompts"),
        (lambda content: content.splitlines(True)[0] * 2, "line 2: is no completion of line 2"),
        (lambda content: content + b"{", "line 4: is no beginning of a completion"),
    ],
)
def test_what_is_not_theirs_is_left_alone(path, change, message):
    content = change(finish(path, range(3)))
    path.write_bytes(content)
    with pytest.raises(PromptError, match=message):
        OutputFile(path, PROMPTS)
    assert path.read_bytes() == content


def test_two_processes_do_not_mix_their_lines(path):
    """What the first has written since the second looked stays as it is."""
    finish(path, [0])
    first, second = OutputFile(path, PROMPTS), OutputFile(path, PROMPTS)
    first.write(1, PROMPTS[1], "text")
    content = path.read_bytes()
    with pytest.raises(RunStopped, match="was changed by another process: wait until it has ended"):
        second.write(1, PROMPTS[1], "text")
    assert path.read_bytes() == content
    first.write(2, PROMPTS[2], "text")
    assert OutputFile(path, PROMPTS).num_done == 3


def test_messages_say_what_the_caller_advises(path):
    path.write_text("precious")
    with pytest.raises(PromptError, match="is no beginning of a completion: remove it"):
        OutputFile(path, PROMPTS, remedy="remove it")


def test_a_place_that_cannot_be_written_to_is_refused_at_once(path, tmp_path):
    with pytest.raises(FileError, match="cannot be written: No such file"):
        OutputFile(tmp_path / "missing" / "texts.jsonl", PROMPTS)
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(PromptError, match=f"output file {place} is no file"):
            OutputFile(place, PROMPTS)


def test_a_link_to_a_file_that_is_not_there_yet_is_followed(path, tmp_path):
    path.symlink_to(tmp_path / "elsewhere.jsonl")
    OutputFile(path, PROMPTS)
    assert path.is_symlink() and not path.exists()
    assert finish(path, range(3)) == (tmp_path / "elsewhere.jsonl").read_bytes()


def test_a_write_that_fails_keeps_what_is_there(path):
    finish(path, [0])
    output = OutputFile(path, PROMPTS)
    path.unlink()
    path.mkdir()
    with pytest.raises(RunStopped, match=r"cannot be written: Is a directory.*; 1 of 3 completions are there, and the"):
        output.write(1, PROMPTS[1], "text")


REFUSED = PromptError("line 2: is not JSON")


def numbers(path) -> list[tuple]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["id"], line.get("prompt_number"), line.get("sample")) for line in lines]


def test_lines_as_they_come_say_which_prompts_they_are_of(path):
    output = OutputFile(path, PROMPTS, order="arrival")
    output.go_on(SETTINGS)
    output.write(2, PROMPTS[2], "text 2\n")
    output.write(0, PROMPTS[0], "text 0\n")
    assert numbers(path) == [(3, 3, None), (1, 1, None)]
    again = OutputFile(path, PROMPTS)  # in either order
    assert [again.is_done(row) for row in range(3)] == [True, False, True]
    again.go_on(SETTINGS)
    again.write(1, PROMPTS[1], "text 1\n")
    assert numbers(path)[2] == (2, None, None)  # after 1
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert OutputFile(path, PROMPTS, order="arrival").num_done == whole[:size].count(b"\n")


def test_prompts_that_were_refused_have_no_line_until_they_are_mended(path):
    """Of those that cannot be read and those that are found too long later."""
    prompts = [PROMPTS[0], REFUSED, PROMPTS[1], PROMPTS[2]]
    output = OutputFile(path, prompts)
    output.go_on(SETTINGS)
    output.write(3, PROMPTS[2], "text 3")
    output.skip(2)
    assert (output.num_done, output.num_waiting) == (0, 1)
    output.write(0, PROMPTS[0], "text 0")
    assert (output.num_done, output.num_rows) == (2, 2)
    assert numbers(path) == [(1, None, None), (3, 4, None)]

    mended = Prompt.of_record({"id": 9, "prompt": "mended"}, "line 2")
    output = OutputFile(path, [PROMPTS[0], mended, *PROMPTS[1:]])
    assert (output.num_done, output.num_rows) == (2, 4)
    output.go_on(SETTINGS)
    output.write(2, PROMPTS[1], "text 2")
    output.write(1, mended, "text 1")
    assert numbers(path) == [(1, None, None), (3, 4, None), (9, 2, None), (2, None, None)]
    with pytest.raises(PromptError, match="line 3: is of a prompt that cannot be read: line 2: is not JSON"):
        OutputFile(path, prompts)


def test_samples_of_a_prompt(path):
    output = OutputFile(path, [PROMPTS[0], REFUSED, PROMPTS[1]], num_samples=2)
    output.go_on(SETTINGS)
    for row in (1, 5, 0, 4):
        output.write(row, PROMPTS[row // 4], f"text {row}")
    assert numbers(path) == [(1, None, 0), (1, None, 1), (2, 3, 0), (2, None, 1)]
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(True)[:3]))
    again = OutputFile(path, [PROMPTS[0], REFUSED, PROMPTS[1]], num_samples=2)
    assert [again.is_done(row) for row in range(6)] == [True, True, False, False, True, False]
    for changes in ({"num_samples": 1}, {"num_samples": 2, "with_log_probs": True}):
        with pytest.raises(PromptError, match="line 1: was made with another number of samples, or other wishes"):
            OutputFile(path, [PROMPTS[0], REFUSED, PROMPTS[1]], **changes)
    path.write_bytes(whole.replace(b'"prompt_number": 3', b'"prompt_number": 1'))
    with pytest.raises(PromptError, match="line 3: is of the same prompt as line 1"):
        OutputFile(path, PROMPTS, num_samples=2)


def test_log_probabilities(path):
    output = OutputFile(path, PROMPTS, with_log_probs=True)
    output.go_on({})
    output.write(0, PROMPTS[0], "text", [5, 6], [-0.5, -1.0])
    line = json.loads(path.read_text())
    assert (line["tokens"], line["log_probs"]) == ([5, 6], [-0.5, -1.0])
    assert OutputFile(path, PROMPTS, with_log_probs=True).num_done == 1


def test_other_hosts_know_what_is_done_and_write_nothing(path, as_host):
    """The name that the second host has is of no file, and none is made."""
    whole = finish(path, range(3))
    path.write_bytes(b"".join(whole.splitlines(True)[:1]))
    other = path.with_name("other.jsonl")
    first, second = (
        as_host(index, lambda name=name: OutputFile(name, PROMPTS)) for index, name in ((0, path), (1, other))
    )
    for index, output in ((0, first), (1, second)):
        as_host(index, lambda output=output: output.go_on(SETTINGS))
        assert [output.is_done(row) for row in range(3)] == [True, False, False]
        output.write(2, PROMPTS[2], "text 2\n")
        assert (output.num_done, output.num_waiting, output.num_rows) == (1, 1, 3)
        output.write(1, PROMPTS[1], "text 1\n")
        assert (output.num_done, output.num_waiting) == (3, 0)
    assert path.read_bytes() == whole
    assert second.completions == []
    assert not other.exists()


def test_what_the_first_host_refuses_all_refuse(path, as_host):
    finish(path, [0])
    outputs = [as_host(index, lambda: OutputFile(path, PROMPTS)) for index in range(2)]
    for index, kind in ((0, PromptError), (1, CheckpointError)):
        with pytest.raises(kind, match="line 1, was made with other settings: step was 7, is 8"):
            as_host(index, lambda index=index: outputs[index].go_on(SETTINGS | {"step": 8}))
