"""What is evaluated: a checkpoint of a run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from rat_jax.checkpoints import LoadedModel, Workdir
from rat_jax.checkpoints.hosts import difference_from_first
from rat_jax.data.corpus import Corpus
from rat_jax.data.tokenizer import Tokenizer
from rat_jax.evaluation.errors import EvaluationError
from rat_jax.paths import local_path
from rat_jax.sampling.prompts import find_tokenizer


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, the workdir that it comes from and that results are written to, and the devices it is on."""

    loaded: LoadedModel
    workdir: Workdir
    mesh: jax.sharding.Mesh
    data_path: str | None  # a corpus named in place of the one that was trained on

    def tokenizer(self) -> Tokenizer:
        """What texts are tokenised with; errors as of `find_tokenizer` and `check_same_on_all_hosts`."""
        tokenizer = find_tokenizer(self.workdir, self.loaded.config, self.data_path)
        check_same_on_all_hosts({"tokenizer": tokenizer.hash})
        return tokenizer

    def corpus(self) -> Corpus:
        """The corpus whose validation split the model is measured on.

        Raises:
          EvaluationError: if there are several that were trained on, or it is gone, and no other is named; or if
            another host has another one.
          DataError, PathError: if it cannot be read, or is not of the model's tokenizer.
        """
        if self.data_path is None and len(trained := self.loaded.config.data.paths) > 1:
            raise EvaluationError(
                f"the model was trained on several corpora: name one with --data_path, as {', '.join(trained.values())}"
            )
        path = local_path(self.data_path or self.loaded.config.data.path, "--data_path")
        if self.data_path is None and not path.exists():
            raise EvaluationError(
                f"{path}, which the model was trained on, is not there: name a corpus with --data_path"
            )
        corpus = Corpus.open(path)
        corpus.check_tokenizer(self.workdir.tokenizer)
        check_same_on_all_hosts({"data": corpus.token_file("validation").header.content_hash})
        return corpus


def check_same_on_all_hosts(values: Mapping[str, Any]) -> None:
    """Refuses what would let hosts, which all compute the same on one mesh, compute other things than the first one.

    All must call this together.

    Raises:
      EvaluationError: naming the host, and both values.
    """
    if (difference := difference_from_first(values)) is not None:
        raise EvaluationError(f"the hosts measure different things: {difference}")
