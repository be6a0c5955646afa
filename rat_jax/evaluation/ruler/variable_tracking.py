"""Variable tracking: which variables hold a number that one of them was given and passed on (RULER, section 3.2)."""

from rat_jax.evaluation.ruler.draft import Draft, Materials, Rendered
from rat_jax.evaluation.ruler.haystacks import filler_words, hide
from rat_jax.evaluation.ruler.items import Items

_NUM_VARIABLES = 5  # one that is given the number, four that take it on
_EXAMPLE_LINES = 10  # of noise in the solved example: some 500 tokens together


class VariableDraft(Draft):
    """The size counts lines of noise."""

    least = 1
    takes_filler = True

    def __init__(self, materials: Materials):
        self._templates = materials.templates
        self._rng = materials.items.rng
        self._number, self.answers = self._draw(materials.items, num_letters=5)
        self._places = sorted(self._rng.random() for _ in self.answers)
        self._example = ""
        if self._templates.worked_examples:
            number, names = self._draw(materials.items, num_letters=3)
            places = sorted(self._rng.random() for _ in names)
            prompt, _ = self._prompt(number, names, places, [self._templates.noise] * _EXAMPLE_LINES)
            self._example = f"{prompt} {' '.join(names)}\n\n"

    def render(self, size: int, num_filler: int = 0) -> Rendered:
        noise = self._templates.noise
        pieces = [noise] * size + filler_words(noise, num_filler)
        prompt, depths = self._prompt(self._number, self.answers, self._places, pieces)
        return Rendered(self._example + prompt, tuple(depths))

    def _draw(self, items: Items, num_letters: int) -> tuple[str, tuple[str, ...]]:
        names = tuple(items.letters(num_letters, upper=True) for _ in range(_NUM_VARIABLES))
        return items.number(5), names

    def _prompt(
        self, number: str, names: tuple[str, ...], places: list[float], pieces: list[str]
    ) -> tuple[str, list[float]]:
        held = [number, *(f"VAR {name}" for name in names[:-1])]
        lines = [f"VAR {name} = {value}" for name, value in zip(names, held, strict=True)]
        context, depths = hide(list(zip(places, lines, strict=True)), pieces, "\n")
        return self._templates.variables.prompt(context, query=number, count=len(names)), depths
