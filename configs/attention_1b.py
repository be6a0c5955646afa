r"""Attention at 1.3 billion parameters: the baseline of arXiv 2507.04416, and the recipe of all five of its models.

Recipe: 24 layers, width 2048, 16 heads of 128, MLP 8192, the LLaMA-2 tokenizer (32,000 ids; no BOS, EOS after each
document), FineWeb-Edu, context 4096, 512 sequences a step, 52,452 steps (110 B tokens), AdamW with peak 8e-4, weight
decay 0.1 on every parameter, 5 % warm-up, cosine to 1e-6, clipping at 1, float32 parameters, bf16 compute.

| config           | parameters | validation perplexity in the paper |
|------------------|------------|------------------------------------|
| attention_1b     | 1273.6 M   | 7.61                               |
| rnn_1b           | 1273.6 M   | 7.82                               |
| rat_1b           | 1298.8 M   | 7.67                               |
| attention_swa_1b | 1273.6 M   |                                    |
| rat_swa_1b       | 1286.2 M   | 7.57                               |

  python -m rat_jax.data.prepare --source 'hf:HuggingFaceFW/fineweb-edu:sample-100BT' \
      --tokenizer path/to/llama-2/tokenizer.model --out data/fineweb-edu
  python train.py --config=configs/attention_1b.py --workdir=runs/attention_1b

The least memory comes first here. On cards of 80 GB, 8 sequences a card at a time are faster with
`--config.model.remat=dots --config.model.scan_unroll=24`; with one card that is also
`--config.optimizer.accumulation_steps=64` (RAT: 65,200 tokens/s on an H100, `docs/performance.md`).
"""

from ml_collections import config_dict

from configs import default


def get_config() -> config_dict.ConfigDict:
    config = default.get_config()
    config.model.vocab_size = 32_000
    config.model.width = 2048
    config.model.num_layers = 24
    config.model.num_heads = 16
    config.model.mlp_width = 8192
    config.model.pattern = ("attention",)
    config.model.local_attention.window = 1024
    config.model.rnn.max_timescale = 4096
    config.model.rattention.window = 512
    config.model.dtype = "bfloat16"
    config.model.remat = "block"

    config.data.path = "data/fineweb-edu"
    config.data.seq_len = 4096
    config.data.global_batch_size = 512
    config.data.num_workers = 4

    config.optimizer.learning_rate = 8e-4
    config.optimizer.min_learning_rate = 1e-6
    config.optimizer.accumulation_steps = 16  # 32 sequences at a time: 4 a card on 8 cards

    config.training.num_steps = 52_452
    config.training.validate_every_steps = 1000
    config.training.validation_batches = 4
    config.training.checkpoint_every_steps = 1000
    return config
