"""RAT in place of the global layers of `configs/rattention_3b.py`: a pattern that neither paper has.

No layer keeps a key for every token: RAT keeps one for every 16, RAttention those of its window. What it shares with
the other 3B models stands in `configs/attention_3b.py`.

  python train.py --config=configs/rat_rattention_3b.py --workdir=runs/rat_rattention_3b
"""

from ml_collections import config_dict

from configs import rattention_3b


def get_config() -> config_dict.ConfigDict:
    config = rattention_3b.get_config()
    config.model.pattern = ("rat", "rattention", "rattention", "rattention")
    return config
