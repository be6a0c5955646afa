"""Gated DeltaNet and sliding-window attention in turn at 1.3 billion parameters (the H1 of arXiv 2412.06464).

Heads are those of `configs/gated_deltanet_1b.py`, recipe and window those of `configs/attention_1b.py`. 22 layers have
1265.7 M parameters, where RAT and sliding-window attention in turn have 1286.2 M.

  python train.py --config=configs/gated_deltanet_swa_1b.py --workdir=runs/gated_deltanet_swa_1b
"""

from ml_collections import config_dict

from configs import gated_deltanet_1b


def get_config() -> config_dict.ConfigDict:
    config = gated_deltanet_1b.get_config()
    config.model.pattern = ("gated_deltanet", "local_attention")
    config.model.num_layers = 22
    return config
