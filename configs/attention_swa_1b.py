"""Attention and sliding-window attention in turn at 1.3 billion parameters, window 1024 (arXiv 2507.04416).

The recipe and the figures to expect are those of `configs/attention_1b.py`.

  python train.py --config=configs/attention_swa_1b.py --workdir=runs/attention_swa_1b
"""

from ml_collections import config_dict

from configs import attention_1b


def get_config() -> config_dict.ConfigDict:
    config = attention_1b.get_config()
    config.model.pattern = ("attention", "local_attention")
    return config
