"""RAT-SWA of 1.1 million parameters on Python's standard library: a few minutes on a laptop.

Every field that a config can have is set here for this run; `rat_jax/config.py` has the meanings, `rat_jax/mixers`
those of the groups of mixers. Other configs start from this one and change lines.

  python -m rat_jax.data.prepare --source python-stdlib --tokenizer bpe:2048 --out data/python-stdlib-bpe2048
  python train.py --config=configs/default.py --workdir=runs/default

Expected (the library of Python 3.11): 4.0 nats a token on the whole validation split, 1.27 a byte, after some 500
seconds of CPU time. As many tokens in batches of 8 reach 1.29, and as much time on bytes (257 ids) 1.62.
"""

import dataclasses
import typing
from typing import Any

from ml_collections import config_dict

from rat_jax.mixers import MIXERS, MixerConfig

# Fields whose value here is not the default of `rat_jax.config` or `rat_jax.mixers`, and why.
DEVIATIONS = {
    "data.path": "one corpus, of text that is already there",
    "model.mlp_width": "said, as the width is",
    "model.remat": "less memory to fill is quicker on a CPU, too",
    "model.local_attention.window": "sequences are short",
    "model.rnn.max_timescale": "the sequence length, as in the release",
    "model.rattention.window": "sequences are short",
    "optimizer.learning_rate": "a small model takes larger steps",
    "optimizer.min_learning_rate": "in proportion",
    "training.log_every_steps": "a short run",
    "training.validate_every_steps": "a short run",
    "training.validation_batches": "a small model validates soon",
    "training.checkpoint_every_steps": "a short run",
}


def get_config() -> config_dict.ConfigDict:
    config = config_dict.ConfigDict()
    config.seed = 0

    config.model = config_dict.ConfigDict()
    config.model.vocab_size = 2048  # the end of a document, 256 bytes and the most frequent pieces of text: bpe:2048
    config.model.width = 128
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.num_kv_heads = config_dict.placeholder(int)  # one for each query head
    config.model.qk_norm = False
    config.model.mlp_width = 512
    config.model.mlp_kind = "gelu"
    config.model.pattern = ("rat", "local_attention")
    config.model.dtype = "float32"
    config.model.remat = "block"  # less memory to fill is quicker here, too
    config.model.scan_unroll = 1  # repeats of the pattern without a loop: more compile longer, and copy less

    # Every kind has its group with its defaults, so that `--config.model.pattern` may name any of them.
    for kind, mixer in MIXERS.items():
        config.model[kind] = config_dict.ConfigDict(_settings(mixer.Config))
    config.model.local_attention.window = 32  # tokens
    config.model.rnn.max_timescale = 256  # tokens; the sequence length, as in the release
    config.model.rattention.window = 32  # tokens

    config.data = config_dict.ConfigDict()
    config.data.path = "data/python-stdlib-bpe2048"
    config.data.corpora = config_dict.ConfigDict()  # none beside it; `configs/mixture.py` has several
    config.data.seq_len = 256  # tokens
    config.data.global_batch_size = 4  # sequences
    config.data.segment_documents = False
    config.data.first_target_id = 0
    config.data.num_workers = 0

    config.optimizer = config_dict.ConfigDict()
    config.optimizer.learning_rate = 3e-3
    config.optimizer.min_learning_rate = 1e-5
    config.optimizer.warmup_fraction = 0.05
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.95
    config.optimizer.epsilon = 1e-8
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0
    config.optimizer.accumulation_steps = 1

    config.training = config_dict.ConfigDict()
    config.training.num_steps = 1400
    config.training.log_every_steps = 20
    config.training.validate_every_steps = 350
    config.training.validation_batches = 32
    config.training.checkpoint_every_steps = 350
    config.training.checkpoint_every_minutes = config_dict.placeholder(float)  # by steps alone
    config.training.checkpoints_to_keep = 2
    config.training.wandb_project = config_dict.placeholder(str)
    config.training.on_non_finite = "stop"
    config.training.on_spike = "ignore"
    config.training.spike_factor = 2.0
    config.training.spike_window_steps = 100
    config.training.max_skips_in_a_row = 10
    config.training.profile_step = config_dict.placeholder(int)  # none
    config.training.profile_num_steps = 3

    config.mesh = config_dict.ConfigDict()
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.context = 1
    config.mesh.tensor = 1

    config.init = config_dict.ConfigDict()
    config.init.path = config_dict.placeholder(str)  # random parameters
    config.init.step = config_dict.placeholder(int)  # the newest
    config.init.optimizer = False

    config.evaluation = config_dict.ConfigDict()
    config.evaluation.on_failure = "report"
    config.evaluation.length = config_dict.ConfigDict()
    config.evaluation.length.every_steps = config_dict.placeholder(int)  # never
    config.evaluation.length.lengths = ()  # tokens
    config.evaluation.length.max_batches = 4
    config.evaluation.length.batch_tokens = 16_384
    config.evaluation.ruler = config_dict.ConfigDict()
    config.evaluation.ruler.every_steps = config_dict.placeholder(int)  # never
    config.evaluation.ruler.tasks = ()  # as ("niah_single_1", "vt")
    config.evaluation.ruler.context_lengths = ()  # tokens
    config.evaluation.ruler.num_examples = 100
    config.evaluation.ruler.templates = "harness"
    config.evaluation.ruler.essay = config_dict.placeholder(str)  # none
    config.evaluation.ruler.answer_tokens = config_dict.placeholder(int)  # RULER's
    config.evaluation.ruler.seed = 0
    config.evaluation.ruler.batch_tokens = 16_384
    config.evaluation.answers = config_dict.ConfigDict()
    config.evaluation.answers.every_steps = config_dict.placeholder(int)  # never
    config.evaluation.answers.file = config_dict.placeholder(str)  # JSON lines
    config.evaluation.answers.context_length = config_dict.placeholder(int)  # data.seq_len
    config.evaluation.answers.max_new_tokens = 256
    config.evaluation.answers.limit = config_dict.placeholder(int)  # all records
    config.evaluation.answers.batch_tokens = 16_384
    config.evaluation.tasks = config_dict.ConfigDict()
    config.evaluation.tasks.every_steps = config_dict.placeholder(int)  # never
    config.evaluation.tasks.names = ()  # as ("arc_easy", "csr")
    config.evaluation.tasks.folder = config_dict.placeholder(str)  # the harness's own task files
    config.evaluation.tasks.limit = config_dict.placeholder(int)  # all documents
    config.evaluation.tasks.batch_tokens = 16_384
    return config


def _settings(mixer_config: type[MixerConfig]) -> dict[str, Any]:
    """The defaults of a kind of mixer; where one is None, a place whose type the command line can read."""
    hints = typing.get_type_hints(mixer_config)
    return {
        name: config_dict.placeholder(typing.get_args(hints[name])[0]) if value is None else value
        for name, value in dataclasses.asdict(mixer_config()).items()
    }
