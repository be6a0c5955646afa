r"""RAT and sliding-window attention in turn at 1.3 billion parameters: the best model of arXiv 2507.04416.

The recipe and the figures to expect are those of `configs/attention_1b.py`.

  python train.py --config=configs/rat_swa_1b.py --workdir=runs/rat_swa_1b

Without position encoding (NoPE) it generalises to four times its training length:

  python train.py --config=configs/rat_swa_1b.py --workdir=runs/rat_swa_nope_1b \
      --config.model.rat.rope=False --config.model.local_attention.rope=False
"""

from ml_collections import config_dict

from configs import attention_1b


def get_config() -> config_dict.ConfigDict:
    config = attention_1b.get_config()
    config.model.pattern = ("rat", "local_attention")
    return config
