"""The run that live faults meet: some seconds of steps, a checkpoint every few."""

from ml_collections import config_dict

from configs import default


def get_config() -> config_dict.ConfigDict:
    config = default.get_config()
    config.model.vocab_size = 29
    config.model.width = 16
    config.model.num_layers = 1
    config.model.num_heads = 1
    config.model.mlp_width = 16
    config.model.pattern = ("rnn",)
    config.data.seq_len = 16
    config.data.global_batch_size = 8
    config.training.log_every_steps = 5
    config.training.validate_every_steps = 60
    config.training.validation_batches = 4
    config.training.checkpoint_every_steps = 30
    config.training.checkpoints_to_keep = 2
    return config
