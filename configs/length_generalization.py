"""Does a model keep its loss beyond its training length? Small models with and without rotation of positions.

The study of arXiv 2507.04416, where RAT-SWA without position encoding keeps its loss up to four times the training
length (test loss at 4K, 8K and 16K: 2.60, 2.59, 2.66) and with RoPE does not (2.58, 3.07, 3.59), with 2 million
parameters. `docs/length_generalization.md` has what was measured.

  python -m rat_jax.data.prepare --source python-stdlib --tokenizer bpe:2048 --out data/python-stdlib-bpe2048
  python train.py --config=configs/length_generalization.py:rat_swa_nope --workdir=runs/length_rat_swa_nope
  python eval.py --workdir=runs/length_rat_swa_nope --length_generalization=8
  python docs/draw_length_generalization.py runs/length_*

The model after the colon is one of `MODELS`. Smaller ones, for a CPU, are in `docs/length_generalization.md`.
"""

from ml_collections import config_dict

from configs import default

# The mixers of a repeated group of layers, and those of them that rotate queries and keys by position.
MODELS = {
    "attention_rope": (("attention",), ("attention",)),
    "attention_nope": (("attention",), ()),
    "attention_swa_rope": (("attention", "local_attention"), ("attention", "local_attention")),
    "attention_swa_nope": (("attention", "local_attention"), ()),
    "rat_rope": (("rat",), ("rat",)),
    "rat_nope": (("rat",), ()),
    "rat_swa_rope": (("rat", "local_attention"), ("rat", "local_attention")),
    "rat_swa_nope": (("rat", "local_attention"), ()),
    # As in arXiv 2506.15545: global attention without positions, windows with them.
    "attention_rattention": (("attention", "rattention"), ("rattention",)),
    "rattention": (("rattention",), ("rattention",)),
}


def get_config(model: str = "rat_swa_nope") -> config_dict.ConfigDict:
    if model not in MODELS:
        raise ValueError(f"{model!r} is no model of this file, which are {', '.join(MODELS)}")
    pattern, rotating = MODELS[model]
    config = default.get_config()
    config.model.width = 192
    config.model.num_layers = 4
    config.model.num_heads = 6
    config.model.mlp_width = 768
    config.model.pattern = pattern
    for kind in ("attention", "local_attention", "rat", "rattention"):
        config.model[kind].rope = kind in rotating

    config.data.seq_len = 256  # tokens: what positions are multiples of
    config.data.global_batch_size = 32
    config.data.segment_documents = False  # long rows need no long documents; a new document is no new position

    config.optimizer.learning_rate = 2e-3
    config.training.num_steps = 2000
    config.training.log_every_steps = 50
    config.training.validate_every_steps = 500
    config.training.validation_batches = 8
    config.training.checkpoint_every_steps = 1000

    config.evaluation.length.every_steps = 500
    config.evaluation.length.lengths = (1024,)  # tokens: four times the training's
    return config
