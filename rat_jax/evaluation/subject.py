"""What is evaluated: a checkpoint of a run."""

import dataclasses

import jax

from rat_jax.checkpoints import LoadedModel, Workdir
from rat_jax.data.tokenizer import Tokenizer
from rat_jax.sampling.prompts import find_tokenizer


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, the workdir that it comes from and that results are written to, and the devices it is on."""

    loaded: LoadedModel
    workdir: Workdir
    mesh: jax.sharding.Mesh
    data_path: str | None  # a corpus named in place of the one that was trained on

    def tokenizer(self) -> Tokenizer:
        """What texts are tokenised with; errors as of `find_tokenizer`."""
        return find_tokenizer(self.workdir, self.loaded.config, self.data_path)
