"""`configs/default.py` on two corpora: nine rows of Python's standard library to one of this project's pages.

  python -m rat_jax.data.prepare --source python-stdlib --tokenizer bpe:2048 --out data/python-stdlib-bpe2048
  python -m rat_jax.data.prepare --source README.md 'docs/*.md' --document_separator '\\n## ' \\
      --tokenizer data/python-stdlib-bpe2048 --out data/pages-bpe2048
  python train.py --config=configs/mixture.py --workdir=runs/mixture

The log and the console have the validation loss of each, as `validation_loss/code`, and their mean by the weights.
`--config.data.corpora.pages.weight=3` changes a share. `docs/data.md` has more.
"""

from ml_collections import config_dict

from configs import default


def get_config() -> config_dict.ConfigDict:
    config = default.get_config()
    config.data.path = ""
    config.data.corpora.code = config_dict.ConfigDict()
    config.data.corpora.code.path = "data/python-stdlib-bpe2048"
    config.data.corpora.code.weight = 9.0
    config.data.corpora.pages = config_dict.ConfigDict()
    config.data.corpora.pages.path = "data/pages-bpe2048"
    config.data.corpora.pages.weight = 1.0
    return config
