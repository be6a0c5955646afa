"""The loss in sequences of other lengths."""

from collections.abc import Callable, Mapping

import jax
from flax import nnx

from rat_jax.checkpoints.store import LoadedModel, abstract_model
from rat_jax.checkpoints.workdir import Workdir
from rat_jax.config import Config
from rat_jax.data.corpus import Corpus
from rat_jax.evaluation.length_generalization import measure
from rat_jax.evaluation.perplexity import check_length


class LengthEvaluator:
    """The loss of the validation split in sequences of other lengths: `loss_N`, of longer ones also `loss_N_beyond`."""

    name = "length"

    def __init__(self, config: Config, corpus: Corpus, mesh: jax.sharding.Mesh, workdir: Workdir):
        """Checks the lengths.

        Raises:
          EvaluationError: if the split has no sequence of one of them.
        """
        self._config, self._corpus, self._mesh, self._workdir = config, corpus, mesh, workdir
        self._settings = config.evaluation.length
        self._graphdef = abstract_model(config.model)[0]
        self.every_steps = self._settings.every_steps
        for length in self._settings.lengths:
            check_length(corpus, length)

    def run(self, params: nnx.State, step: int, check: Callable[[], None]) -> Mapping[str, float]:
        def checked(batches, num_batches):
            for batch in batches:
                check()
                yield batch

        loaded = LoadedModel(self._config, nnx.merge(self._graphdef, params), step, self._workdir.path)
        figures = {}
        for length in self._settings.lengths:
            found = measure(
                loaded,
                self._corpus,
                self._mesh,
                length,
                batch_tokens=self._settings.batch_tokens,
                max_batches=self._settings.max_batches,
                progress=checked,
            )
            figures[f"loss_{length}"] = found.loss
            if found.loss_beyond is not None:
                figures[f"loss_{length}_beyond"] = found.loss_beyond
        return figures
