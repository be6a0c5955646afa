"""Chat templates: what of a chat is prompt and what answer, and templates that cannot be used."""

import json

import pytest

from rat_jax.data import DataError
from rat_jax.data.chat_template import END, FILE, ChatTemplate, load_chat_template, read_chat_template

# Of the form that most published tokenizers have.
CHATML = (
    "{%- for message in messages %}\n    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' "
    "+ '\\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
# Of LLaMA-2's form: answers end with the end of a document.
INSTRUCTIONS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_answers_end_where_the_template_says():
    turns = ChatTemplate(INSTRUCTIONS).turns(chat("a", "b", "c", "d"), "x")
    assert turns == [("[INST] a [/INST]", " b "), ("[INST] c [/INST]", " d ")]


def test_answers_of_a_template_that_writes_no_end():
    turns = ChatTemplate(CHATML).turns(chat("a", "b", "c", "d"), "x")
    opened = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert turns == [(opened.format("a"), "b<|im_end|>\n"), (opened.format("c"), "d<|im_end|>\n")]


def test_what_a_chat_without_answers_has_in_common_with_one():
    """A prompt alone is what training has read before the answer."""
    template = ChatTemplate(CHATML)
    (prompt, answer), (again, other) = (template.turns(chat("a", text), "x")[0] for text in ("b", "something else"))
    assert prompt == again and answer != other


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages | length }}{{ messages[-1].content }}", "chat 3: the chat template writes other text before ans"),
        ("{{ raise_exception('no such role') }}", "chat 3: the chat template refuses it: no such role"),
        ("{{ messages + 1 }}", "chat 3: the chat template refuses it: "),
        ("{{ messages.append(1) }}", "chat 3: the chat template refuses it: .*unsafe"),
        ("{{ messages.__class__.__mro__ }}", "chat 3: the chat template refuses it: .*unsafe"),
        ("{% for i in range(10**9) %}a{% endfor %}", "chat 3: the chat template refuses it: Range too big"),
        ("{{ messages[0].content }}", "chat 3: the chat template writes nothing for answer 1"),
    ],
    ids=range(7),
)
def test_templates_that_make_no_turns(source, message):
    with pytest.raises(DataError, match=message):
        ChatTemplate(source).turns(chat("a", "b"), "chat 3")


def test_it_is_stored_and_read(tmp_path):
    assert load_chat_template(tmp_path) is None
    template = ChatTemplate(CHATML)
    template.save(tmp_path)
    assert load_chat_template(tmp_path) == template
    file = tmp_path / FILE
    file.write_text(file.read_text().replace("user", "usor").replace("assistant", "assistent"))
    with pytest.raises(DataError, match=r"chat_template\.json is damaged: its hash is another one"):
        load_chat_template(tmp_path)


def test_published_files(tmp_path):
    (tmp_path / "a.jinja").write_text(CHATML)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": CHATML}))
    (tmp_path / "mark.jinja").write_bytes(b"\xef\xbb\xbf" + CHATML.encode())  # a byte order mark is no text
    for name in ("a.jinja", "tokenizer_config.json", "mark.jinja"):
        assert read_chat_template(tmp_path / name) == ChatTemplate(CHATML)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jinja", b"\n{% for %}", r"chat template .*a\.jinja, line 2 is no Jinja: "),
        ("a.jinja", b"\xff", r"chat template .*a\.jinja is not UTF-8"),
        ("a.json", b'{"eos_token": "x"}', r"chat template .*a\.json holds no text chat_template \(it has: eos_token\)"),
        (
            "a.json",
            b'{"chat_template": [{"name": "default", "template": "x"}]}',
            r"a\.json holds several: write the one",
        ),
        ("a.json", b"[", r"a\.json is damaged"),
    ],
)
def test_files_that_are_no_template(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_chat_template(tmp_path / name)
    with pytest.raises(DataError, match=r"gone\.jinja cannot be read"):
        read_chat_template(tmp_path / "gone.jinja")


def test_the_end_is_no_character():
    assert END.encode().decode() == END and not END.isprintable() and END.strip() == END
