"""Trains a model, or resumes a run that was interrupted: the same command does both.

  python train.py --config=configs/default.py --workdir=runs/default
  python train.py --config=configs/default.py --workdir=runs/wide --config.model.width=256

Exit codes: 0 the run is finished; 2 the config, the data or the workdir do not fit, and nothing was changed; 75 a
signal (SIGTERM or Ctrl-C) ended it after a checkpoint: start it again; 1 anything else.
"""

import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from rat_jax.config import Config, ConfigError, config_from_dict
from rat_jax.errors import RatJaxError
from rat_jax.interrupts import INTERRUPTED
from rat_jax.training import NonFiniteError, train

_CONFIG = config_flags.DEFINE_config_file("config", None, "file with get_config()", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, log, loss curve")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "one of several hosts: find the others first")


def _parse(arguments: list[str]) -> Config:
    """Reads flags and the config file with its overrides.

    Raises:
      ConfigError: naming the flag or the field.
    """
    try:
        rest = flags.FLAGS(arguments)
        for name in ("config", "workdir"):
            if flags.FLAGS[name].value is None:
                raise ConfigError(f"--{name} is missing; usage: train.py --config=configs/default.py --workdir=DIR")
        if len(rest) > 1:
            raise ConfigError(f"{rest[1]!r} is no flag")
        return config_from_dict(_CONFIG.value)
    except (flags.Error, AttributeError, KeyError, OSError, TypeError) as error:
        raise ConfigError(str(error)) from None


def main(arguments: list[str]) -> None:
    app.define_help_flags()
    try:
        config = _parse(arguments)
        if _DISTRIBUTED.value:
            jax.distributed.initialize()
        result = train(config, _WORKDIR.value)
    except NonFiniteError as error:
        sys.exit(f"error: {error}")
    except RatJaxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if not result.finished:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main(sys.argv)
