"""A run as its workdir tells of it, be it finished, under way, imported or damaged."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence

from rat_jax.checkpoints.folder import step_folders
from rat_jax.checkpoints.manifest import Manifest
from rat_jax.checkpoints.run_log import Record, read_lines
from rat_jax.checkpoints.workdir import CheckpointError, RunRecord, Workdir
from rat_jax.config import Config, ConfigError, config_from_dict
from rat_jax.data import DataError
from rat_jax.data.corpus import Corpus, Split
from rat_jax.data.tokenizer import TokenizerInfo, read_info
from rat_jax.errors import RatJaxError
from rat_jax.files import FileError
from rat_jax.paths import PathError, local_path
from rat_jax.report.measurements import Measurements
from rat_jax.report.result_files import read_measurements

_LARGEST_FIGURE = 1e30  # of a log; beyond it no axis has a use


class ReportError(RatJaxError, ValueError):
    """Runs that cannot be compared, or a page that cannot be put where it should be."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What is known of a run."""

    path: pathlib.Path
    label: str  # among the runs of the page
    record: RunRecord
    config: Config | None  # None: it cannot be read
    log: tuple[Record, ...]  # by step
    measurements: Measurements
    tokenizer: TokenizerInfo | None
    corpus: Corpus | None  # that it was trained on; None where it is not there any more, or there are several
    devices: str | None  # of the process that wrote the newest checkpoint
    remarks: tuple[str, ...]  # what is wrong with its files

    @property
    def step(self) -> int:
        """The last step that anything tells of."""
        return max([self.record.saved_step or 0, *(record["step"] for record in self.log)])

    @property
    def state(self) -> str:
        """How far it has come, in words."""
        if not self.log and not self.record.saved_step:
            return "no step logged yet" if self.record.saved_step is None else "a model alone, imported"
        if self.config is None:
            return f"step {self.step:,}"
        num_steps = self.config.training.num_steps
        return f"finished, {self.step:,} steps" if self.step >= num_steps else f"step {self.step:,} of {num_steps:,}"

    @property
    def tokens_per_step(self) -> int | None:
        return None if self.config is None else self.config.data.global_batch_size * self.config.data.seq_len

    @property
    def num_tokens(self) -> int | None:
        """Tokens that it was trained on so far, those of batches that were skipped too."""
        return None if self.tokens_per_step is None or not self.log else self.step * self.tokens_per_step

    @property
    def tokenizer_key(self) -> str | None:
        """The same for runs whose tokens are the same, as far as that is known."""
        if self.tokenizer is not None:
            return self.tokenizer.hash
        return None if self.config is None else f"unknown, {self.config.model.vocab_size:,} ids"

    @property
    def tokenizer_name(self) -> str:
        if self.tokenizer is not None:
            return f"{self.tokenizer.kind}, {self.tokenizer.vocab_size:,} ids"
        return self.tokenizer_key or "unknown"

    def figures(self, *names: str) -> list[tuple[int, float]]:
        """Steps and figures of the log, each by the first of the names that a record has."""
        found = []
        for record in self.log:
            value = next((record[name] for name in names if record.get(name) is not None), None)
            if value is not None and abs(value) < _LARGEST_FIGURE:
                found.append((record["step"], value))
        return found

    @property
    def validation_losses(self) -> list[str]:
        """The names of figures that are losses of one of several corpora."""
        return sorted({name for record in self.log for name in record if name.startswith("validation_loss/")})

    def bits_per_byte(self, split: Split, loss: float) -> float | None:
        """A loss on a split in bits a byte of its text; None where that cannot be known."""
        if self.corpus is None or self.config is None:
            return None
        return self.corpus.splits[split].bits_per_byte(loss, self.config.data.first_target_id)

    @property
    def bytes_per_step(self) -> float | None:
        """Bytes of text of the tokens of a step, of as many a token as in all of the training split."""
        per_token = None if self.corpus is None else self.corpus.splits["train"].bytes_per_token
        return None if per_token is None or self.tokens_per_step is None else per_token * self.tokens_per_step


def read_runs(paths: Sequence[pathlib.Path]) -> list[Run]:
    """The runs of several workdirs, in this order.

    Raises:
      CheckpointError: if one is no workdir.
      ReportError: if one is named twice.
      FileError: if the system refuses to read one.
    """
    places = [path.resolve() for path in paths]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise ReportError(f"{paths[index]} is the workdir {place}, which is named twice: name each run once")
    return [_read_run(path, label) for path, label in zip(paths, labels(places), strict=True)]


def labels(paths: Sequence[pathlib.PurePath]) -> list[str]:
    """The last names of paths, with as much of the path before each as tells them apart."""
    chosen = []
    for path in paths:
        depth = 1
        while depth < len(path.parts) and sum(other.parts[-depth:] == path.parts[-depth:] for other in paths) > 1:
            depth += 1
        chosen.append(str(pathlib.PurePath(*path.parts[-depth:])))
    return chosen


def _read_run(path: pathlib.Path, label: str) -> Run:
    workdir, remarks = Workdir(path), []
    record = workdir.record()
    config = None
    try:
        config = config_from_dict(record.config)
    except ConfigError as error:
        remarks.append(f"its config cannot be read: {error}")
    lines = read_lines(workdir.log_file)
    if bad := [str(line.number) for line in lines if line.record is None]:
        where = ", ".join(bad[:10]) + (" and others" if len(bad) > 10 else "")
        remarks.append(f"{workdir.log_file.name}: no record is in line {where}; left out")
    tokenizer = None
    if workdir.tokenizer.exists():
        try:
            tokenizer = read_info(workdir.tokenizer)
        except DataError as error:
            remarks.append(f"its tokenizer cannot be read: {error}")
    measurements = read_measurements(path)
    return Run(
        path=path,
        label=label,
        record=record,
        config=config,
        log=_in_order([line.record for line in lines if line.record is not None]),
        measurements=measurements,
        tokenizer=tokenizer,
        corpus=_corpus(config, tokenizer),
        devices=_devices(workdir),
        remarks=(*remarks, *measurements.remarks),
    )


def _in_order(records: Sequence[Record]) -> tuple[Record, ...]:
    """Records by step; where several tell of the same figure of a step, the last one does."""
    merged: dict[int, Record] = {}
    for record in records:
        merged[record["step"]] = merged.get(record["step"], {}) | record
    return tuple(merged[step] for step in sorted(merged))


def _corpus(config: Config | None, tokenizer: TokenizerInfo | None) -> Corpus | None:
    """The corpus of a run, where it still is there and has the run's tokens: the page can do without."""
    if config is None or tokenizer is None or not config.data.path:
        return None
    with contextlib.suppress(DataError, PathError):
        corpus = Corpus.open(local_path(config.data.path, "config.data.path"))
        return corpus if corpus.tokenizer_hash == tokenizer.hash else None
    return None


def _devices(workdir: Workdir) -> str | None:
    for folder in step_folders(workdir.checkpoints):
        with contextlib.suppress(CheckpointError, FileError):  # damaged, or removed by a run that goes on
            return Manifest.read(folder).versions.get("devices")
    return None
