r"""Does a mixer remember what has left its window? Two layers of one mixer on associative recall: minutes on a laptop.

`rat_jax/data/recall.py` has the task: 8 pairs of key and value, queries near them and queries at least 65 tokens
later. The windows reach 32 tokens, those of both layers together 64. `docs/recall.md` has the accuracies.

  python -m rat_jax.data.prepare --source recall:40000 --tokenizer ids:46:0 --out data/recall
  python train.py --config=configs/recall.py:rattention --workdir=runs/recall_rattention
  python docs/draw_recall.py runs/recall_*

The mixer after the colon is one of `rat_jax.mixers.MIXERS`.
"""

from ml_collections import config_dict

from configs import default

_LEARNING_RATES = {"gated_deltanet": 1e-3}  # 1e-2 learns nothing, 3e-3 three times as slowly


def get_config(mixer: str = "rattention") -> config_dict.ConfigDict:
    config = default.get_config()
    config.model.vocab_size = 46
    config.model.width = 64
    config.model.num_layers = 2
    config.model.num_heads = 2
    config.model.qk_norm = True  # where there is softmax attention over tokens: found several times sooner
    config.model.mlp_width = 128
    config.model.pattern = (mixer,)
    config.model.remat = "none"
    config.model.rnn.max_timescale = 81
    config.model.rat.chunk_size = 4
    config.model.rattention.learned_scales = True

    config.data.path = "data/recall"
    config.data.seq_len = 81  # a document and its end
    config.data.global_batch_size = 64
    config.data.first_target_id = 42  # the values

    config.optimizer.learning_rate = _LEARNING_RATES.get(mixer, 1e-2)
    config.training.num_steps = 1000
    config.training.log_every_steps = 50
    config.training.validate_every_steps = 100
    config.training.validation_batches = 8
    config.training.checkpoint_every_steps = 1000
    return config
