r"""Attention at 3 billion parameters: the baseline of arXiv 2506.15545, and what all 3B models here share.

56 layers, width 2048, 16 heads of 128 that share 4 key heads, normed queries and keys, GeGLU of 6656, context 4096,
rotation base 500,000. Optimizer, schedule, tokenizer and number of tokens are those of `configs/attention_1b.py`, not
the paper's.

| config            | layers                                                            | parameters |
|-------------------|-------------------------------------------------------------------|------------|
| attention_3b      | attention                                                         | 2943.1 M   |
| attention_swa_3b  | 1 attention without rotation, 3 sliding windows of 2048           | 2943.1 M   |
| rattention_3b     | 1 attention without rotation, 3 RAttention with windows of 512    | 2943.2 M   |
| rat_rattention_3b | 1 RAT with chunks of 16, 3 RAttention with windows of 512         | 3046.0 M   |

  python train.py --config=configs/attention_3b.py --workdir=runs/attention_3b
"""

from ml_collections import config_dict

from configs import attention_1b


def get_config() -> config_dict.ConfigDict:
    config = attention_1b.get_config()
    config.model.num_layers = 56
    config.model.num_kv_heads = 4
    config.model.qk_norm = True
    config.model.mlp_width = 6656
    config.model.mlp_kind = "geglu"
    config.model.attention.rope_base = 500_000.0
    return config
