"""Gated DeltaNet at 1.3 billion parameters (arXiv 2412.06464), with the recipe of `configs/attention_1b.py`.

6 heads with keys of 256 and values of 512 channels, which are 6 width^2 parameters a layer where attention has 4, and
therefore 21 layers: the shape that flash-linear-attention publishes for width 2048. 1299.8 M parameters, where
attention has 1273.6 M and RAT 1298.8 M. The MLP and the tokens are those of the other 1B models, not of its paper.

  python train.py --config=configs/gated_deltanet_1b.py --workdir=runs/gated_deltanet_1b
"""

from ml_collections import config_dict

from configs import attention_1b


def get_config() -> config_dict.ConfigDict:
    config = attention_1b.get_config()
    config.model.pattern = ("gated_deltanet",)
    config.model.num_layers = 21
    config.model.gated_deltanet.num_heads = 6
    config.model.gated_deltanet.head_dim = 256
    return config
