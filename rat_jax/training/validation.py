"""The validation of a run: the splits of all its corpora, and their losses."""

import dataclasses
import math
from collections.abc import Mapping

from rat_jax.config import Config
from rat_jax.data.pipeline import ValidationData, describe_coverage


class Validation:
    """The validation splits of a run, by the names of their corpora."""

    def __init__(self, config: Config, process_index: int | None = None, process_count: int | None = None):
        """Opens them; arguments and errors as of `ValidationData`."""
        options = {"vocab_size": config.model.vocab_size, "max_batches": config.training.validation_batches}
        options |= {"process_index": process_index, "process_count": process_count}
        self._weights = config.data.weights
        self.splits = {name: ValidationData(data, **options) for name, data in config.data.parts.items()}

    def result(self, losses: Mapping[str, float]) -> "ValidationResult":
        """What the losses of all splits say."""
        total = math.fsum(self._weights.values())
        return ValidationResult(
            loss=math.fsum(self._weights[name] * loss for name, loss in losses.items()) / total,
            fraction=self.fraction,
            parts={name: (loss, self.splits[name].fraction) for name, loss in losses.items() if name},
        )

    @property
    def fraction(self) -> float:
        """The part of all splits' records that is measured."""
        splits = self.splits.values()
        return sum(split.num_taken for split in splits) / sum(split.num_records for split in splits)

    def describe(self) -> str:
        """What losses are measured on, in words."""
        words = describe_coverage(self.fraction)
        return words.replace("split", "splits") if len(self.splits) > 1 else words


@dataclasses.dataclass(frozen=True)
class ValidationResult:
    """The loss after some steps."""

    loss: float  # nats a token; of several corpora the mean by their weights
    fraction: float  # of the splits' records
    parts: Mapping[str, tuple[float, float]]  # loss and fraction of each of several corpora

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def figures(self) -> dict[str, float]:
        """For the log."""
        figures = {
            "validation_loss": self.loss,
            "validation_perplexity": self.perplexity,
            "validation_fraction": self.fraction,
        }
        for name, (loss, fraction) in self.parts.items():
            figures |= {f"validation_loss/{name}": loss, f"validation_fraction/{name}": fraction}
        return figures
