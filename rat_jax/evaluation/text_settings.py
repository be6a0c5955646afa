"""How texts of tasks become what a model reads."""

import dataclasses
from typing import Literal, get_args

from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation_config import NEW_TOKENS

Bos = Literal["empty", "always"]
Truncation = Literal["left", "middle", "right"]


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """What a result depends on beside model and task; the defaults are the harness's."""

    context_length: int  # tokens that are read at a time, those that are generated included
    # Where the id that ends documents stands in for a BOS: before texts that nothing precedes, or before every context.
    bos: Bos = "empty"
    truncation: Truncation = "left"  # what is taken out of a context that is too long
    # Whether a context and its continuation are tokenised as one text and cut where the context's own ids end.
    joint_tokenization: bool = True
    max_new_tokens: int = NEW_TOKENS  # of generated texts, where a task does not say

    def __post_init__(self):
        for name, choices in (("bos", get_args(Bos)), ("truncation", get_args(Truncation))):
            if (value := getattr(self, name)) not in choices:
                raise EvaluationError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if self.max_new_tokens < 1:
            raise EvaluationError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")
