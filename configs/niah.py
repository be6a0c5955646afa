r"""Does a mixer find a needle beyond its window? RULER's niah_single_1, learned from scratch on its training split.

A byte-level model of four layers of one mixer reads 1,024 bytes of one repeated line, in which a number is hidden, and
is asked for it. Windows reach 64 bytes, those of four layers together 256. `docs/evaluation.md` has the results.

  for split in train validation; do
    python -m rat_jax.evaluation.ruler --tokenizer=bytes --task=niah_single_1 --length=1024 --templates=own \
        --answer_tokens=16 --split=$split --num=$([ $split = train ] && echo 30000 || echo 500) \
        --out=data/niah/$split.jsonl
  done
  python -m rat_jax.data.prepare --rows padded --seq_len 1024 --tokenizer bytes --source data/niah/train.jsonl \
      --validation_source data/niah/validation.jsonl --out data/niah/1024
  python train.py --config=configs/niah.py:rattention --workdir=runs/niah_rattention
  python eval.py --workdir=runs/niah_rattention --tasks=niah_single_1 --ruler_templates=own --ruler_answer_tokens=16

The mixer after the colon is one of `rat_jax.mixers.MIXERS`.
"""

from ml_collections import config_dict

from configs import default


def get_config(mixer: str = "rattention") -> config_dict.ConfigDict:
    config = default.get_config()
    config.model.vocab_size = 257
    config.model.width = 256
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.qk_norm = True  # where there is softmax attention over tokens: found several times sooner
    config.model.mlp_width = 768
    config.model.pattern = (mixer,)
    config.model.dtype = "bfloat16"
    config.model.remat = "none"
    config.model.scan_unroll = 4
    config.model.rnn.max_timescale = 1024
    config.model.rat.chunk_size = 8
    config.model.local_attention.window = 64
    config.model.rattention.window = 64
    config.model.rattention.learned_scales = True

    config.data.path = "data/niah/1024"
    config.data.seq_len = 1024
    config.data.global_batch_size = 64

    config.optimizer.learning_rate = 2e-3
    config.training.num_steps = 4000
    config.training.log_every_steps = 100
    config.training.validate_every_steps = 500
    config.training.validation_batches = 4
    config.training.checkpoint_every_steps = 4000
    return config
