"""Needles in a haystack: keys with values, hidden in a text, and a question for some of them (RULER, section 3.1)."""

import dataclasses
from typing import Literal

from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.ruler.draft import Draft, Materials, Rendered
from rat_jax.evaluation.ruler.haystacks import Distractors, Haystack, Noise, filler_words, hide
from rat_jax.evaluation.ruler.items import Kind


@dataclasses.dataclass(frozen=True)
class Needles:
    """What is hidden where, and how much of it is asked for."""

    haystack: Literal["noise", "essay", "needle"]
    keys: Kind = "words"
    values: Kind = "numbers"
    num_keys: int = 1
    num_values: int = 1  # of each key
    num_queries: int = 1  # keys that are asked for


NEEDLES = {  # as in scripts/synthetic.yaml of NVIDIA/RULER
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", values="uuids"),
    "niah_multikey_1": Needles("essay", num_keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Needles("essay", num_values=4),
    "niah_multiquery": Needles("essay", num_keys=4, num_queries=4),
}


class NeedleDraft(Draft):
    """The size is that of the haystack."""

    least = 1
    takes_filler = True

    def __init__(self, task: str, materials: Materials):
        """Raises an `EvaluationError` if the task needs an essay and there is none."""
        self._needles = needles = NEEDLES[task]
        self._materials = materials
        items, rng = materials.items, materials.items.rng
        keys = [items.draw(needles.keys) for _ in range(needles.num_keys)]
        values = [[items.draw(needles.values) for _ in range(needles.num_values)] for _ in keys]
        hidden = [(key, value) for key, of_key in zip(keys, values, strict=True) for value in of_key]
        asked = rng.sample(range(needles.num_keys), needles.num_queries)
        self._queries = [keys[index] for index in asked]
        self.answers = tuple(value for index in asked for value in values[index])
        depths = {value: rng.random() for _, value in hidden}
        if materials.depth is not None:
            depths[self.answers[0]] = materials.depth
        rng.shuffle(hidden)
        self._hidden = [(depths[value], value, self._needle(key, value)) for key, value in hidden]
        self._haystack = self._make_haystack(task)

    def render(self, size: int, num_filler: int = 0) -> Rendered:
        templates = self._materials.templates
        pieces = self._haystack.pieces(size) + filler_words(templates.noise, num_filler)
        needles = [(depth, needle) for depth, _, needle in self._hidden]
        context, depths = hide(needles, pieces, self._haystack.separator)
        *before, last = self._queries
        query = f"{', '.join(before)}, and {last}" if before else last
        template = templates.one_needle if len(self.answers) == 1 else templates.several_needles
        prompt = template.prompt(context, query=query, count=len(self.answers), **self._kinds())
        depth_of = {value: depth for (_, value, _), depth in zip(self._hidden, depths, strict=True)}
        return Rendered(prompt, tuple(depth_of[answer] for answer in self.answers))

    def _make_haystack(self, task: str) -> Haystack:
        materials = self._materials
        match self._needles.haystack:
            case "noise":
                return Noise(materials.templates.noise)
            case "needle":
                draw = materials.items.draw
                return Distractors(lambda: self._needle(draw(self._needles.keys), draw(self._needles.values)))
            case "essay":
                if materials.essay is None:
                    raise EvaluationError(f"{task} hides its needles in an essay: name a text file or folder for it")
                return materials.essay.part(materials.split, materials.items.rng)

    def _needle(self, key: str, value: str) -> str:
        return self._materials.templates.needle.format(key=key, value=value, **self._kinds())

    def _kinds(self) -> dict[str, str]:
        return {"kinds": self._needles.values, "kind": self._needles.values.removesuffix("s")}
