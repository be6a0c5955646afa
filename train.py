"""Trains a model, or resumes a run that was interrupted: the same command does both.

  python train.py --config=configs/default.py --workdir=runs/default
  python train.py --config=configs/default.py --workdir=runs/wide --config.model.width=256

With --dry_run it compiles one step and prints what that needs, for the devices that are there or for named TPUs:

  python train.py --config=configs/rat_1b.py --dry_run --topology=v5p:4x4x4

Exit codes: 0 the run is finished, or the step fits; 2 the flags, the config, the data or the workdir do not fit, and
nothing was changed; 75 a signal (SIGTERM or Ctrl-C) ended it, with the last step saved if there was one: start it
again; 76 another process of the job is lost, stuck or did not come: start all again; 1 the run could not go on, or the
step does not fit.
"""

from rat_jax import interrupts

if __name__ == "__main__":
    interrupts.exit_while_importing()

import re

from absl import flags

from rat_jax import cluster, program
from rat_jax.checkpoints.workdir import flatten
from rat_jax.compilation_cache import OFF, define_cache_flag, use_cache
from rat_jax.config import Config, config_to_dict
from rat_jax.config_file import define_config_flag
from rat_jax.paths import local_path
from rat_jax.training import train
from rat_jax.training.dry_run import dry_run

_config, _use_compilation_cache = define_config_flag(), define_cache_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, log, loss curve")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "compile a step and print what it needs; a workdir is not looked at")
_TOPOLOGY = flags.DEFINE_string("topology", None, "with --dry_run: of TPUs that need not be there, such as v5e:16x16")
_join_cluster = cluster.define_cluster_flags()


def _facts(config: Config) -> dict[str, object]:
    """What the processes of a job have alike."""
    fields = flatten(config_to_dict(config), "config.")
    # Hosts may have copies of data of their own: what is in them is compared later.
    return {name: value for name, value in fields.items() if not re.fullmatch(r"config\.data\.(.+\.)?path", name)}


def _dry_run() -> int:
    config = _config()
    if _TOPOLOGY.value is None:
        _join_cluster(_facts(config))
    use_cache(OFF)  # programs from there lack figures, and took no time to compile
    return 0 if dry_run(config, _TOPOLOGY.value) else program.FAILED


def main() -> int:
    if _DRY_RUN.value:
        return _dry_run()
    if _TOPOLOGY.value is not None:
        raise program.FlagError("--topology is for --dry_run alone: a run takes the devices that are there")
    if _WORKDIR.value is None:
        raise program.FlagError("--workdir is missing; train.py --help lists the flags")
    config, workdir = _config(), local_path(_WORKDIR.value, "--workdir")
    _join_cluster(_facts(config) | {"--workdir": str(workdir)})
    _use_compilation_cache()
    return 0 if train(config, workdir).finished else program.INTERRUPTED


if __name__ == "__main__":
    program.run(main, required=["config"], at_end=cluster.leave)
