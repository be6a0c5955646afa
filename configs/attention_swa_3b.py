"""Windows of 2048 with attention every fourth layer at 3 billion parameters: a baseline of arXiv 2506.15545.

What it shares with the other 3B models stands in `configs/attention_3b.py`.

  python train.py --config=configs/attention_swa_3b.py --workdir=runs/attention_swa_3b
"""

from ml_collections import config_dict

from configs import attention_3b


def get_config() -> config_dict.ConfigDict:
    config = attention_3b.get_config()
    config.model.pattern = ("attention", "local_attention", "local_attention", "local_attention")
    config.model.attention.rope = False
    config.model.local_attention.window = 2048
    config.model.local_attention.rope_base = 500_000.0
    return config
