"""The config of a model of the studies: what is the same for all, and what its kind changes.

The recipe is that of arXiv 2507.04416 at 1.3 billion parameters (`configs/attention_1b.py`), scaled once and tuned for
no mixer: the learning rate is 8e-4 by the square root of the widths' ratio (2048 / 384), the window a quarter of the
sequence, and 32,768 tokens a step, since 2 million would leave 33 steps. All kinds have 33.5 million parameters, within
2 %, of which embeddings are 12.3 million.

  python train.py --config=benchmarks/evidence/train_config.py:rat_swa --workdir=runs/rat_swa
  python train.py --config=benchmarks/evidence/train_config.py:rat_swa-small --workdir=runs/rat_swa_small

With `-small` after the kind everything is so small that a CPU takes seconds.
"""

from ml_collections import config_dict

from benchmarks.evidence.studies import KINDS
from configs import default

CORPUS = "data/evidence/corpus"
SMALL = "-small"


def get_config(kind: str = "rat_swa") -> config_dict.ConfigDict:
    name = kind.removesuffix(SMALL)
    if name not in KINDS:
        raise ValueError(f"{name!r} is no kind of the studies, which are {', '.join(KINDS)}")
    config = default.get_config()
    config.model.vocab_size = 32_000
    config.model.width = 384
    config.model.num_layers = 12
    config.model.num_heads = 6
    config.model.pattern = KINDS[name].pattern
    config.model.mlp_width = KINDS[name].mlp_width
    config.model.qk_norm = KINDS[name].qk_norm
    config.model.dtype = "bfloat16"
    config.model.remat = "dots"  # less to store, which is quicker
    config.model.local_attention.window = 512  # tokens: a quarter of a sequence, as in the paper
    config.model.rnn.max_timescale = 2048
    for mixer, settings in KINDS[name].mixers.items():
        config.model[mixer].update(settings)

    config.data.path = CORPUS
    config.data.seq_len = 2048
    config.data.global_batch_size = 16

    config.optimizer.learning_rate = 2e-3
    config.optimizer.min_learning_rate = 1e-6

    config.training.num_steps = 2000  # 65.5 million tokens
    config.training.log_every_steps = 20
    config.training.validate_every_steps = 250
    config.training.validation_batches = 8
    config.training.checkpoint_every_steps = 2000
    config.training.checkpoints_to_keep = 1
    return _small(config) if name != kind else config


def _small(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
    config.model.vocab_size = 512
    config.model.width = 32
    config.model.num_layers = 4
    config.model.num_heads = 2
    config.model.mlp_width //= 24
    config.model.dtype = "float32"
    config.data.seq_len = 64
    config.data.global_batch_size = 4
    config.model.local_attention.window = max(2, config.model.local_attention.window // 32)
    config.model.rattention.window = max(2, config.model.rattention.window // 32)
    config.training.num_steps = 8
    config.training.log_every_steps = 2
    config.training.validate_every_steps = 4
    config.training.validation_batches = 2
    config.training.checkpoint_every_steps = 8
    return config
