"""Reads prompts of the package's own templates as a model should: by what they say, with no code of the generators."""

import re
from collections import Counter

NEEDLE = re.compile(r"The secret (?:number|uuid) of (\S+) is (\S+?)\.(?=\s)")
_ASKED = re.compile(r"The secret (?:numbers|number|uuid) of (.*) (?:is|are)$")
_SETTING = re.compile(r"^VAR ([A-Z]+) = (?:VAR )?(\S+)$", re.MULTILINE)


def read_answers(prompt: str) -> set[str]:
    """The answers to the question at the end of a prompt."""
    question = prompt.rsplit("\n", 1)[1]
    if asked := _ASKED.search(question):
        keys = re.split(r", and |, ", asked[1])
        return {value for key, value in NEEDLE.findall(prompt) if key in keys}
    if number := re.search(r"that hold (\d+) are$", question):
        holding: set[str] = {number[1]}
        for name, value in _SETTING.findall(prompt):  # in the order of the text: a variable is set before it is used
            if value in holding:
                holding.add(name)
        return holding - {number[1]}
    if "of this list" in prompt:
        return {word for word, _ in Counter(re.findall(r"\d+\. (\S+)", prompt)).most_common(10)}
    text = prompt.split("\n")[1]
    return {word for word, _ in Counter(word for word in text.split() if word != "...").most_common(3)}


def place_of(prompt: str, value: str) -> float:
    """The share of the haystack, spaces not counted, before the needle with a value.

    The haystack is all but the first and the last line, without the needles of the keys that are asked for and of
    those that stand in an essay or in noise: all needles, unless the haystack is made of needles.
    """
    text = prompt.split("\n", 1)[1].rsplit("\n", 1)[0] + "\n"
    needles = NEEDLE.findall(text)
    (key,) = (key for key, found in needles if found == value)
    start = re.search(rf"The secret \S+ of {re.escape(key)} is {re.escape(value)}\.", text).start()

    def hay(part: str) -> int:
        is_needle_haystack = len(needles) > 4
        drop = re.compile(rf"The secret \S+ of {re.escape(key)} is \S+\.") if is_needle_haystack else NEEDLE
        return len(re.sub(r"\s", "", drop.sub("", part)))

    return hay(text[:start]) / hay(text)
