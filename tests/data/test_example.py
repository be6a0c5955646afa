"""Records as examples: what they may be, and what is refused by name."""

import pytest

from rat_jax.data import DataError
from rat_jax.data.chat_template import END, ChatTemplate
from rat_jax.data.example import Example, Turn, read_example

TEMPLATE = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}")
USER, ASSISTANT = ({"role": role, "content": role[0] * 3} for role in ("user", "assistant"))


@pytest.mark.parametrize("answer", ["yes", ["yes", "no"]], ids=str)
def test_prompt_and_answer(answer):
    example = read_example({"prompt": " ask ", "answer": answer, "id": 7}, "x", None)
    assert example == Example((), " ask ", ("yes",) if answer == "yes" else ("yes", "no"))
    assert Example.from_text(example.to_text()) == example


def test_a_chat():
    template = ChatTemplate(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    example = read_example({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, "x", template)
    assert example.earlier == (Turn("<user>uuu<assistant>", "aaa"),)
    assert (example.prompt, example.answers) == ("<user>uuu<assistant>", ("aaa",))
    assert Example.from_text(example.to_text()) == example
    assert list(example.texts()) == ["<user>uuu<assistant>", "aaa"] * 2


def test_examples_with_the_same_prompt_have_the_same_key():
    one, other = (read_example({"prompt": "p", "answer": answer}, "x", None) for answer in "ab")
    assert one.key == other.key != read_example({"prompt": "q", "answer": "a"}, "x", None).key


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (3, "f, line 2 is no example, got 3; expected"),
        ({"text": "a"}, r"f, line 2 has neither prompt nor messages \(it has: text\)"),
        ({"prompt": "a", "messages": []}, "has both a prompt and messages"),
        ({"prompt": "a"}, "f, line 2: answer is missing"),
        ({"prompt": "a", "answer": []}, "f, line 2: the list answer is empty"),
        ({"prompt": "a", "answer": ["b", 3]}, "f, line 2: answer is 3, which is no text"),
        ({"prompt": " \n", "answer": "b"}, "f, line 2: prompt is empty: give it text, or leave the record out"),
        ({"prompt": "a", "answer": ""}, "f, line 2: answer is empty"),
        ({"prompt": "\ud800", "answer": "b"}, "f, line 2: prompt holds half of a surrogate pair"),
        ({"prompt": "a", "answer": f"b{END}"}, r"f, line 2: answer holds U\+FDD0"),
        ({"messages": []}, "f, line 2: messages must be a list of objects"),
        ({"messages": ["a"]}, "f, line 2, message 1 must be an object with role and content, got 'a'"),
        ({"messages": [{"role": "user"}]}, "f, line 2, message 1: content is missing"),
        ({"messages": [ASSISTANT, USER]}, "the last message must be an answer, of the role assistant, got 'user'"),
    ],
    ids=str,
)
def test_what_is_no_example_is_refused_by_name(record, message):
    with pytest.raises(DataError, match=message):
        read_example(record, "f, line 2", TEMPLATE)


def test_a_chat_without_a_template():
    with pytest.raises(DataError, match=r"f, line 2 holds a chat, and there is no template .* --chat_template"):
        read_example({"messages": [USER, ASSISTANT]}, "f, line 2", None)
