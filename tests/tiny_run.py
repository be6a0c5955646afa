"""A corpus and a config so small that a run of a few steps takes a second."""

import pathlib
import sys
from typing import Any

from rat_jax.config import Config, config_from_dict, config_to_dict
from rat_jax.data.prepare import Settings, prepare

NUM_STEPS = 6


def make_corpus(
    folder: pathlib.Path,
    vocab_size: int = 29,
    num_ids: int = 2000,
    tokenizer: str | None = None,
    line_ids: int = 23,
    **changes: Any,
) -> pathlib.Path:
    """A prepared corpus of some `num_ids` ids below `vocab_size`, in documents of a line of `line_ids` each.

    With a `tokenizer` the numbers are texts that it encodes; `changes` are further fields of the settings.
    """
    texts = folder / "texts"
    texts.mkdir(parents=True)
    numbers = [(i * i + 3 * i) % (vocab_size - 1) + 1 for i in range(num_ids)]
    lines = [" ".join(map(str, numbers[i : i + line_ids])) for i in range(0, len(numbers), line_ids)]
    (texts / "numbers.txt").write_text("\n".join(lines))
    settings = Settings(
        source=(str(texts),),
        validation_source=(),
        validation_fraction=0.2,
        tokenizer=f"ids:{vocab_size}:0" if tokenizer is None else tokenizer,
        eos_token=None,
        field="text",
        document_separator="\n",
        invalid_utf8="refuse",
        **changes,
    )
    prepare(settings, folder / "corpus", num_workers=0, overwrite=False)
    return folder / "corpus"


def tiny_config(corpus: pathlib.Path | str, **changes: Any) -> Config:
    """A config of two narrow layers; `changes` are keyed by dotted names with __ for the dot: training__num_steps."""
    values = {
        "seed": 0,
        "model": {
            "vocab_size": 29,
            "width": 16,
            "num_layers": 2,
            "num_heads": 2,
            "num_kv_heads": None,
            "qk_norm": False,
            "mlp_width": 32,
            "mlp_kind": "gelu",
            "pattern": ("rat", "local_attention"),
            "local_attention": {"window": 5},
            "rnn": {"max_timescale": 16},
            "rat": {"chunk_size": 4},
            "rattention": {"window": 5, "meta_tokens": 3, "learned_scales": True},
            "dtype": "float32",
            "remat": "none",
            "scan_unroll": 1,
        },
        "data": {
            "path": str(corpus),
            "seq_len": 16,
            "global_batch_size": 8,
            "segment_documents": True,
            "first_target_id": 0,
            "num_workers": 0,
        },
        "optimizer": {
            "learning_rate": 1e-2,
            "min_learning_rate": 1e-4,
            "warmup_fraction": 0.3,
            "beta1": 0.9,
            "beta2": 0.95,
            "epsilon": 1e-8,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
            "accumulation_steps": 1,
        },
        "training": {
            "num_steps": NUM_STEPS,
            "log_every_steps": 1,
            "validate_every_steps": 4,
            "validation_batches": 2,
            "checkpoint_every_steps": 2,
            "checkpoints_to_keep": 2,
            "wandb_project": None,
        },
        "mesh": {"data": 1, "fsdp": 1},
        "init": {"path": None, "step": None, "optimizer": False},
        "evaluation": {"on_failure": "report", "length": {"every_steps": None, "lengths": (), "max_batches": 4}},
    }
    for name, value in changes.items():
        *groups, field = name.split("__")
        group = values
        for key in groups:
            group = group[key]
        group[field] = value
    return config_from_dict(values)


def train_command(folder: pathlib.Path, config: Config) -> list[str]:
    """The command, for the top level, of a run in `folder`/run."""
    file = folder / "config.py"
    file.write_text(
        f"from ml_collections import config_dict\n\n"
        f"def get_config():\n    return config_dict.ConfigDict({config_to_dict(config)!r})\n"
    )
    return [sys.executable, "train.py", f"--config={file}", f"--workdir={folder / 'run'}"]
