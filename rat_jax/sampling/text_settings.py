"""How texts are made, as a user says it."""

import dataclasses
from typing import Any

from rat_jax.sampling.errors import require
from rat_jax.sampling.sampling_params import SamplingParams
from rat_jax.sampling.stop_strings import check_stop


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """How a text follows from its prompt."""

    max_new_tokens: int  # after which a text ends if it has not before
    temperature: float  # this and the next three: `SamplingParams.of`
    top_k: int | None
    top_p: float | None
    repetition_penalty: float
    seed: int  # of the random numbers
    min_new_tokens: int  # so many at least, unless a stop string comes before
    num_samples: int  # texts of each prompt, which is read once for all
    stop: tuple[str, ...]  # a text ends before the first of these strings that appears in it
    log_probs: bool  # keep the tokens, and how likely each was under the model's own distribution

    def __post_init__(self):
        """Refuses what cannot be, or does nothing.

        Raises:
          SamplingError: naming the setting.
        """
        for name, least in (("max_new_tokens", 1), ("min_new_tokens", 0), ("num_samples", 1)):
            require(getattr(self, name) >= least, f"{name} must be {least} or more, got {getattr(self, name)}")
        require(
            self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}",
        )
        require(0 <= self.seed < 2**32, f"seed must lie between 0 and 2**32 - 1, got {self.seed}")
        require(
            self.num_samples == 1 or self.temperature > 0,
            f"num_samples {self.num_samples} has no effect at temperature 0, which makes the same text each time: give "
            f"a temperature above 0, or leave num_samples out",
        )
        check_stop(self.stop)
        self.rule  # noqa: B018, errors of it come now

    @property
    def rule(self) -> SamplingParams:
        """How tokens are chosen."""
        return SamplingParams.of(self.temperature, self.top_k, self.top_p, self.repetition_penalty)

    def to_record(self) -> dict[str, Any]:
        """For the output; parts that do nothing are left out, but for those that always were there."""
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.min_new_tokens > 0:
            values["min_new_tokens"] = self.min_new_tokens
        if self.num_samples > 1:
            values["num_samples"] = self.num_samples
        if self.stop:
            values["stop"] = list(self.stop)
        if self.log_probs:
            values["log_probs"] = True
        return values
