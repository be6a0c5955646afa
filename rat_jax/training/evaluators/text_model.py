"""The model of a run as evaluators that generate texts need it."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rat_jax.checkpoints.store import abstract_model
from rat_jax.config import Config
from rat_jax.data.corpora import Corpora
from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.subject import check_same_on_all_hosts
from rat_jax.memory import free_bytes, gib, tree_bytes
from rat_jax.model import LanguageModel

_NO_MESH = Mesh(np.empty((), dtype=object), ())


class TextModel:
    """Whole parameters on every device, outside of a mesh; and the tokenizer."""

    def __init__(self, config: Config, corpora: Corpora, mesh: Mesh):
        """Computes nothing.

        Raises:
          EvaluationError: a tokenizer of another vocabulary than the model's, or on several hosts than the first one's.
          DataError: if the corpus lacks its tokenizer.
        """
        self.tokenizer = corpora.tokenizer()
        if self.tokenizer.vocab_size != config.model.vocab_size:
            raise EvaluationError(
                f"the tokenizer in {corpora.first.path} has a vocabulary of {self.tokenizer.vocab_size}, but "
                f"config.model.vocab_size is {config.model.vocab_size}: make them the same"
            )
        check_same_on_all_hosts({"tokenizer": self.tokenizer.hash})
        self.mesh = mesh
        self._graphdef = abstract_model(config.model)[0]

    @contextlib.contextmanager
    def of(self, params: nnx.State) -> Iterator[LanguageModel]:
        """The model with parameters that are on the mesh; rows of any number are read in the context, where no mesh is.

        Raises:
          EvaluationError: if a device that holds a part of the parameters has no room for all.
        """
        if not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params)):
            needed, free = tree_bytes(params), free_bytes(self.mesh.local_devices[0])
            if free is not None and needed > free:
                raise EvaluationError(
                    f"texts are generated with all parameters on each device, which take {gib(needed)}, and it has "
                    f"{gib(free)} free: measure checkpoints with eval.py instead"
                )
            params = jax.device_put(params, NamedSharding(self.mesh, PartitionSpec()))
        with jax.set_mesh(_NO_MESH):
            yield nnx.merge(self._graphdef, params)
