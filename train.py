"""Trains a model, or resumes a run that was interrupted: the same command does both.

  python train.py --config=configs/default.py --workdir=runs/default
  python train.py --config=configs/default.py --workdir=runs/wide --config.model.width=256

Exit codes: 0 the run is finished; 2 the flags, the config, the data or the workdir do not fit, and nothing was changed;
75 a signal (SIGTERM or Ctrl-C) ended it, with the last step saved if there was one: start it again; 76 another process
of the job is lost, stuck or did not come: start all again; 1 the run could not go on.
"""

from rat_jax import interrupts

if __name__ == "__main__":
    interrupts.exit_while_importing()

from absl import flags

from rat_jax import cluster, program
from rat_jax.checkpoints.workdir import flatten
from rat_jax.compilation_cache import define_cache_flag
from rat_jax.config import config_to_dict
from rat_jax.config_file import define_config_flag
from rat_jax.paths import local_path
from rat_jax.training import train

_config, _use_compilation_cache = define_config_flag(), define_cache_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, log, loss curve")
_join_cluster = cluster.define_cluster_flags()


def main() -> int:
    config, workdir = _config(), local_path(_WORKDIR.value, "--workdir")
    fields = flatten(config_to_dict(config), "config.")
    fields.pop("config.data.path")  # hosts may have copies of their own: what is in them is compared later
    _join_cluster(fields | {"--workdir": str(workdir)})
    _use_compilation_cache()
    return 0 if train(config, workdir).finished else program.INTERRUPTED


if __name__ == "__main__":
    program.run(main, required=["config", "workdir"], at_end=cluster.leave)
