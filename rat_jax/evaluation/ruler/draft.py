"""An example of a task, of which the length of its text is still open."""

import abc
import dataclasses
from collections.abc import Callable

from rat_jax.evaluation.ruler.haystacks import Essay
from rat_jax.evaluation.ruler.items import Items, Split
from rat_jax.evaluation.ruler.templates import Templates


@dataclasses.dataclass(frozen=True)
class Materials:
    """What a draft is made from."""

    items: Items
    templates: Templates
    split: Split
    essay: Essay | None
    depth: float | None  # that the first needle asked for is wanted at; None draws it
    context_length: int  # that RULER chooses sizes by
    fits: Callable[[str], bool]  # whether a prompt leaves room for its answer


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A draft at one size."""

    prompt: str
    depths: tuple[float, ...]  # of each answer; empty where answers have no place


class Draft(abc.ABC):
    """All that is random is drawn, so that a size has one prompt, and a larger one more of the same text."""

    answers: tuple[str, ...]
    least: int  # the smallest size
    takes_filler: bool  # whether `num_filler` words more than a size may fill a context

    @abc.abstractmethod
    def render(self, size: int, num_filler: int = 0) -> Rendered:
        """The prompt of a size."""
