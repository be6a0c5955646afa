"""RAT-SWA of 1.1 million parameters on Python's standard library: a few minutes on a laptop.

Every field that a config can have stands here with its value for this run; `rat_jax/config.py` has the meanings. Other
configs start from this one and change lines.

  python -m rat_jax.data.prepare --source python-stdlib --tokenizer bpe:2048 --out data/python-stdlib-bpe2048
  python train.py --config=configs/default.py --workdir=runs/default

Expected (the library of Python 3.11): 4.0 nats a token on the whole validation split, 1.27 a byte, after some 500
seconds of CPU time. As many tokens in batches of 8 reach 1.29, and as much time on bytes (257 ids) 1.62.
"""

from ml_collections import config_dict


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

    config.model.attention = config_dict.ConfigDict()
    config.model.attention.rope = True
    config.model.attention.rope_base = 10_000.0

    config.model.local_attention = config_dict.ConfigDict()
    config.model.local_attention.window = 32  # tokens
    config.model.local_attention.rope = True
    config.model.local_attention.rope_base = 10_000.0

    config.model.rnn = config_dict.ConfigDict()
    config.model.rnn.max_timescale = 256  # tokens; the sequence length, as in the release

    config.model.rat = config_dict.ConfigDict()
    config.model.rat.chunk_size = 16  # tokens
    config.model.rat.num_groups = 2
    config.model.rat.rope = True
    config.model.rat.rope_base = 10_000.0

    config.model.rattention = config_dict.ConfigDict()
    config.model.rattention.window = 32  # tokens
    config.model.rattention.rope = True
    config.model.rattention.rope_base = 500_000.0
    config.model.rattention.feature_map = "softmax"
    config.model.rattention.meta_tokens = 0  # 128 is the paper's choice where the state starts from learned tokens
    config.model.rattention.learned_scales = False

    config.data = config_dict.ConfigDict()
    config.data.path = "data/python-stdlib-bpe2048"
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
    config.training.checkpoints_to_keep = 2
    config.training.wandb_project = config_dict.placeholder(str)

    config.mesh = config_dict.ConfigDict()
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
