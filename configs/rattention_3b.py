"""RAttention with windows of 512 and attention every fourth layer at 3 billion parameters (arXiv 2506.15545).

What it shares with the other 3B models stands in `configs/attention_3b.py`. In the paper it matches the baseline with
windows of 2048 and keeps working far beyond its training length. What the norms of its two branches start from is not
said there: 0.1 here, since small models that start from 1 stay behind their windows alone (docs/evidence.md).

  python train.py --config=configs/rattention_3b.py --workdir=runs/rattention_3b

`configs/rattention_3b.py:rattention` has RAttention in every layer: a cache that does not grow.
"""

from ml_collections import config_dict

from configs import attention_3b

_PATTERNS = {"hybrid": ("attention", "rattention", "rattention", "rattention"), "rattention": ("rattention",)}


def get_config(layers: str = "hybrid") -> config_dict.ConfigDict:
    if layers not in _PATTERNS:
        raise ValueError(f"{layers!r} is none of {', '.join(_PATTERNS)}")
    config = attention_3b.get_config()
    config.model.pattern = _PATTERNS[layers]
    config.model.attention.rope = False
    config.model.rattention.window = 512
    config.model.rattention.branch_scale = 0.1
    return config
