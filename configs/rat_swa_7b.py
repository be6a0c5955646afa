"""RAT and sliding-window attention in turn at 7 billion parameters: a size that the paper of RAT does not have.

The shape is LLaMA-2 7B's: 32 layers, width 4096, 32 heads of 128, SwiGLU of 11,008; 6641.0 M parameters. All else, the
optimizer included, is as in `configs/rat_swa_1b.py`.

  python train.py --config=configs/rat_swa_7b.py --workdir=runs/rat_swa_7b
"""

from ml_collections import config_dict

from configs import rat_swa_1b


def get_config() -> config_dict.ConfigDict:
    config = rat_swa_1b.get_config()
    config.model.width = 4096
    config.model.num_layers = 32
    config.model.num_heads = 32
    config.model.mlp_width = 11_008
    config.model.mlp_kind = "swiglu"
    return config
