"""RAttention with windows of 512 and attention every fourth layer at 12 billion parameters (arXiv 2506.15545).

40 layers, width 5120, 40 heads of 128 that share 8 key heads, GeGLU of 16,384: 12,747.5 M parameters. All else, the
optimizer included, is as in `configs/rattention_3b.py`.

  python train.py --config=configs/rattention_12b.py --workdir=runs/rattention_12b

`configs/rattention_12b.py:rattention` has RAttention in every layer: a cache that does not grow.
"""

from ml_collections import config_dict

from configs import rattention_3b


def get_config(layers: str = "hybrid") -> config_dict.ConfigDict:
    config = rattention_3b.get_config(layers)
    config.model.width = 5120
    config.model.num_layers = 40
    config.model.num_heads = 40
    config.model.num_kv_heads = 8
    config.model.mlp_width = 16_384
    return config
