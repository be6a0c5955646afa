r"""Fine-tuning a pretrained model on prompts and answers: the recipe of arXiv 2507.04416, and its data sets by name.

The argument is the model's config, and after a comma the data set, one of `rat_jax.data.sft_tasks`:

  python -m rat_jax.data.sft_tasks narrativeqa_summary --out data/sft/narrativeqa_summary/train.jsonl \
      --source hf:deepmind/narrativeqa:default:train
  python -m rat_jax.data.sft_tasks narrativeqa_summary --out data/sft/narrativeqa_summary/validation.jsonl \
      --source hf:deepmind/narrativeqa:default:validation
  python -m rat_jax.data.sft_tasks narrativeqa_summary --out data/sft/narrativeqa_summary/test.jsonl \
      --source hf:deepmind/narrativeqa:default:test
  python -m rat_jax.data.prepare --rows padded --seq_len 4096 --tokenizer runs/rat_1b/tokenizer \
      --source data/sft/narrativeqa_summary/train.jsonl \
      --validation_source data/sft/narrativeqa_summary/validation.jsonl --out data/sft/narrativeqa_summary/4096
  python train.py --config=configs/sft.py:rat_1b,narrativeqa_summary --workdir=runs/rat_1b_narrativeqa_summary
  python eval.py --workdir=runs/rat_1b_narrativeqa_summary --sft=data/sft/narrativeqa_summary/test.jsonl

`docs/finetuning.md` has the other data sets, chats, and what the paper measured.
"""

from ml_collections import config_dict

from configs import (
    attention_1b,
    attention_3b,
    attention_swa_1b,
    attention_swa_3b,
    default,
    gated_deltanet_1b,
    gated_deltanet_swa_1b,
    rat_1b,
    rat_rattention_3b,
    rat_swa_1b,
    rat_swa_7b,
    rattention_3b,
    rattention_12b,
    rnn_1b,
)

_MODELS = {
    "attention_1b": attention_1b,
    "attention_3b": attention_3b,
    "attention_swa_1b": attention_swa_1b,
    "attention_swa_3b": attention_swa_3b,
    "default": default,
    "gated_deltanet_1b": gated_deltanet_1b,
    "gated_deltanet_swa_1b": gated_deltanet_swa_1b,
    "rat_1b": rat_1b,
    "rat_rattention_3b": rat_rattention_3b,
    "rat_swa_1b": rat_swa_1b,
    "rat_swa_7b": rat_swa_7b,
    "rattention_12b": rattention_12b,
    "rattention_3b": rattention_3b,
    "rnn_1b": rnn_1b,
}
# Steps of an epoch at 128 padded rows a step; for data of your own `rat_jax.data.prepare` prints them.
_STEPS = {
    "narrativeqa_summary": 512,  # 32,747 questions with two answers each
    "narrativeqa_full": 512,
    "qmsum": 10,  # 1,257 questions
    "wikisum": 280,  # 35,775 articles
}


def get_config(argument: str = "rat_1b,narrativeqa_summary") -> config_dict.ConfigDict:
    model, _, task = argument.partition(",")
    task = task or "narrativeqa_summary"
    for name, known in ((model, _MODELS), (task, _STEPS)):
        if name not in known:
            raise ValueError(f"{name!r} is none of {', '.join(known)}; write MODEL,TASK after the colon")
    config = _MODELS[model].get_config()

    # What the run starts from: the pretraining's workdir, or --config.init.path=FILE.pth of the PyTorch release.
    config.init.path = f"runs/{model}"

    config.data.path = f"data/sft/{task}/4096"
    config.data.seq_len = 4096  # tokens of a row, --seq_len of prepare; the paper also has 16,384
    config.data.global_batch_size = 128  # rows of a step
    # Padding follows a row's only example, which does not see it. True for rows that were packed, which are fewer, and
    # for which attention to one example alone takes slower kernels.
    config.data.segment_documents = False

    config.optimizer.learning_rate = 1e-5  # peak
    config.optimizer.min_learning_rate = 1e-6
    config.optimizer.warmup_fraction = 0.05  # as in pretraining, like betas, clipping and the cosine
    config.optimizer.weight_decay = 0.01
    config.optimizer.accumulation_steps = 4  # 32 rows at a time: 4 a card on 8 cards

    config.training.num_steps = _STEPS[task]  # one epoch
    config.training.log_every_steps = 1  # an epoch may be ten steps
    config.training.validate_every_steps = 50  # the loss of validation answers; the last step is always validated
    config.training.validation_batches = 4
    config.training.checkpoint_every_steps = 100  # and the last one
    return config
