"""The fields of a config that say what a run reads."""

import dataclasses
import re
from collections.abc import Mapping

from rat_jax.errors import require


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """One of several corpora."""

    path: str  # folder with its token files
    weight: float  # its share of the rows is weight / (sum of all weights)

    def __post_init__(self):
        require(self.weight > 0, f"weight must be above 0, got {self.weight}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Token files, as `python -m rat_jax.data.prepare` writes them, and how they are cut into batches.

    Either `path` or `corpora` names them.
    """

    path: str = ""  # folder with the token files of the `train` and `validation` splits; empty: `corpora`
    corpora: Mapping[str, CorpusConfig] = dataclasses.field(default_factory=dict, hash=False)  # by names of your own
    seq_len: int  # T, tokens of a training sequence
    global_batch_size: int  # sequences of an optimizer step, over all hosts and devices
    segment_documents: bool = False  # True: no mixer looks across a document's end; False: the release's behaviour
    first_target_id: int = 0  # targets of lower ids do not count in the loss; 0: all count
    num_workers: int = 0  # processes that read ahead; 0 reads in the main process

    def __post_init__(self):
        for name in ("seq_len", "global_batch_size"):
            require(getattr(self, name) >= 1, f"{name} must be 1 or more, got {getattr(self, name)}")
        require(self.first_target_id >= 0, f"first_target_id must be 0 or more, got {self.first_target_id}")
        require(self.num_workers >= 0, f"num_workers must be 0 or more, got {self.num_workers}")
        for name in self.corpora:
            require(
                re.fullmatch(r"[\w.-]+", name) is not None,
                f"corpora: {name!r} is no name of letters, digits, _, . and -",
            )
        require(bool(self.path or self.corpora), "path is missing: it must be a path, or corpora name several")
        require(
            not (self.path and self.corpora),
            f"path is {self.path!r} and corpora name {', '.join(self.corpora)}: give one of the two",
        )
        object.__setattr__(self, "corpora", dict(sorted(self.corpora.items())))

    @property
    def parts(self) -> dict[str, "DataConfig"]:
        """The config of each corpus alone, by name, in their order; that of `path` has the empty name."""
        return {name: dataclasses.replace(self, path=path, corpora={}) for name, path in self.paths.items()}

    @property
    def paths(self) -> dict[str, str]:
        """The folders of all corpora."""
        return {name: corpus.path for name, corpus in self.corpora.items()} or {"": self.path}

    @property
    def weights(self) -> dict[str, float]:
        """Those of all corpora."""
        return {name: corpus.weight for name, corpus in self.corpora.items()} or {"": 1.0}
