"""The gated linear RNN at 1.3 billion parameters: the other end of the line on which RAT lies.

The recipe and the figures to expect are those of `configs/attention_1b.py`.

  python train.py --config=configs/rnn_1b.py --workdir=runs/rnn_1b
"""

from ml_collections import config_dict

from configs import attention_1b


def get_config() -> config_dict.ConfigDict:
    config = attention_1b.get_config()
    config.model.pattern = ("rnn",)
    return config
