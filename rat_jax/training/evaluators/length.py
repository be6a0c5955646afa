"""The loss in sequences of other lengths."""

import itertools
from collections.abc import Callable, Mapping

import jax
from flax import nnx

from rat_jax.checkpoints.store import LoadedModel, abstract_model
from rat_jax.checkpoints.workdir import Workdir
from rat_jax.config import Config
from rat_jax.data.corpora import Corpora
from rat_jax.evaluation.length_generalization import measure
from rat_jax.evaluation.perplexity import check_length


class LengthEvaluator:
    """The loss of the validation split in sequences of other lengths: `loss_N`, of longer ones also `loss_N_beyond`.

    Of several corpora the figures of each end in its name.
    """

    name = "length"

    def __init__(self, config: Config, corpora: Corpora, mesh: jax.sharding.Mesh, workdir: Workdir):
        """Checks the lengths.

        Raises:
          EvaluationError: if the split has no sequence of one of them.
        """
        self._config, self._corpora, self._mesh, self._workdir = config, corpora, mesh, workdir
        self._settings = config.evaluation.length
        self._graphdef = abstract_model(config.model)[0]
        self.every_steps = self._settings.every_steps
        for length in self._settings.lengths:
            for corpus in corpora.by_name.values():
                check_length(corpus, length)

    def run(self, params: nnx.State, step: int, check: Callable[[], None]) -> Mapping[str, float]:
        def checked(batches, num_batches):
            for batch in batches:
                check()
                yield batch

        loaded = LoadedModel(self._config, nnx.merge(self._graphdef, params), step, self._workdir.path)
        figures = {}
        each = self._corpora.by_name.items()
        for length, (name, corpus) in itertools.product(self._settings.lengths, each):
            found = measure(
                loaded,
                corpus,
                self._mesh,
                length,
                batch_tokens=self._settings.batch_tokens,
                max_batches=self._settings.max_batches,
                progress=checked,
            )
            end = f"/{name}" if name else ""
            figures[f"loss_{length}{end}"] = found.loss
            if found.loss_beyond is not None:
                figures[f"loss_{length}_beyond{end}"] = found.loss_beyond
        return figures
