r"""Does a mixer find a needle beyond its window? RULER's niah_single_1, learned from scratch on its training split.

A byte-level model of four layers of one mixer reads one line again and again, in which a number is hidden, and is asked
for it. Windows reach 64 bytes, those of four layers together 256. A model that starts with 1,024 bytes needs many times
as long, so that it first learns to copy a number from 384 bytes, mostly from the last fifth of them:

  ruler="python -m rat_jax.evaluation.ruler --tokenizer=bytes --task=niah_single_1 --templates=own --answer_tokens=16"
  $ruler --length=384 --split=train --num=12000 --out=data/niah/384.jsonl
  $ruler --length=384 --split=train --num=40000 --seed=1 --out=data/niah/all.jsonl
  python -c "import json; print(*(x for x in open('data/niah/all.jsonl') if json.loads(x)['depth'] >= 0.8), sep='')" \
      > data/niah/near.jsonl
  $ruler --length=384 --split=validation --num=300 --out=data/niah/validation_384.jsonl
  $ruler --length=1024 --split=train --num=30000 --out=data/niah/1024.jsonl
  $ruler --length=1024 --split=validation --num=500 --out=data/niah/validation_1024.jsonl
  prepare="python -m rat_jax.data.prepare --rows padded --tokenizer bytes"
  $prepare --seq_len 384 --source data/niah/near.jsonl data/niah/384.jsonl \
      --validation_source data/niah/validation_384.jsonl --out data/niah/384
  $prepare --seq_len 1024 --source data/niah/1024.jsonl \
      --validation_source data/niah/validation_1024.jsonl --out data/niah/1024

  python train.py --config=configs/niah.py:rattention,384 --workdir=runs/niah_rattention_384
  python train.py --config=configs/niah.py:rattention,1024 --workdir=runs/niah_rattention_1024
  python eval.py --workdir=runs/niah_rattention_1024 --tasks=niah_single_1 --ruler_templates=own \
      --ruler_answer_tokens=16 --batch_tokens=262144

The argument is one of `rat_jax.mixers.MIXERS` and the length, of which the second goes on from the first.
`docs/evaluation.md` has the results.
"""

from ml_collections import config_dict

from configs import default

_LENGTHS = {"384": (3e-3, 6000), "1024": (1e-3, 4000)}  # bytes: learning rate, steps


def get_config(argument: str = "rattention,384") -> config_dict.ConfigDict:
    mixer, _, length = argument.partition(",")
    if length not in _LENGTHS:
        raise ValueError(f"{length!r} is none of {', '.join(_LENGTHS)}; write MIXER,LENGTH after the colon")
    learning_rate, num_steps = _LENGTHS[length]

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
    config.model.rat.chunk_size = 4  # with 8 nothing is found in as many steps
    config.model.local_attention.window = 64
    config.model.rattention.window = 64
    config.model.rattention.learned_scales = True

    config.data.path = f"data/niah/{length}"
    config.data.seq_len = int(length)
    config.data.global_batch_size = 64
    if length == "1024":
        config.init.path = f"runs/niah_{mixer}_384"

    config.optimizer.learning_rate = learning_rate
    config.training.num_steps = num_steps
    config.training.log_every_steps = 100
    config.training.validate_every_steps = 500
    config.training.validation_batches = 4
    config.training.checkpoint_every_steps = num_steps
    return config
