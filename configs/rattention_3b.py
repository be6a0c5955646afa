"""RAttention with windows of 512 and attention every fourth layer at 3 billion parameters (arXiv 2506.15545).

What it shares with the other 3B models stands in `configs/attention_3b.py`. In the paper it matches the baseline with
windows of 2048 and keeps working far beyond its training length.

  python train.py --config=configs/rattention_3b.py --workdir=runs/rattention_3b
"""

from ml_collections import config_dict

from configs import attention_3b


def get_config() -> config_dict.ConfigDict:
    config = attention_3b.get_config()
    config.model.pattern = ("attention", "rattention", "rattention", "rattention")
    config.model.attention.rope = False
    config.model.rattention.window = 512
    return config
