"""The start of a job: flags that say which process this is, the meeting, the watch, and JAX's own service."""

import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import sys
from collections.abc import Callable, Iterator

import flax
import jax
from absl import flags

from rat_jax.cluster.meeting import Facts, MeetingError, meet
from rat_jax.cluster.place import Place, detected_place, is_tpu_host, place_of_flags
from rat_jax.cluster.watch import LEAST_SECS, start_watch
from rat_jax.interrupts import caught
from rat_jax.program import FlagError

_JAX_HEARTBEAT_SECS = 100  # JAX's default; ours come first
# What a process may have of its own; the first three are compared where all meet.
_OWN_FLAGS = {
    *("coordinator_address", "num_processes", "process_id", "distributed"),
    *("start_timeout_secs", "lost_after_secs", "compilation_cache"),
}

flags.disclaim_key_flags()  # `--help` shows the flags with those of the program that asks for them


def define_cluster_flags() -> Callable[[Facts], None]:
    """Defines the flags of a process that is one of several.

    Returns:
      What finds the others and starts the watch, once flags are parsed and before JAX is used; nothing where one
      process is all. It takes what must be alike on all, by name, besides the versions. Raises FlagError,
      MeetingError, ProcessLost.
    """
    address = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where all processes meet")
    num_processes = flags.DEFINE_integer("num_processes", None, "how many processes there are")
    process_id = flags.DEFINE_integer("process_id", None, "which of them this is, from 0")
    distributed = flags.DEFINE_bool(
        "distributed",
        None,
        "one of several processes that SLURM, Open MPI or Kubernetes started; left out: only on Cloud TPU",
    )
    start_secs = flags.DEFINE_float("start_timeout_secs", 300.0, "in which all processes must be there")
    lost_secs = flags.DEFINE_float("lost_after_secs", 60.0, "in which a lost or stuck process ends the others")

    def join(facts: Facts) -> None:
        for flag, least in ((start_secs, 1.0), (lost_secs, LEAST_SECS)):
            if not least <= flag.value < 1e6:
                raise FlagError(f"--{flag.name} is {flag.value:g}; it must be {least:g} or more seconds")
        place = place_of_flags(address.value, num_processes.value, process_id.value)
        if place is None and address.value is None:
            place = _found_place(distributed.value, start_secs.value)
        if place is not None:
            _join(place, _versions() | facts, start_secs.value, lost_secs.value)

    return join


def _found_place(distributed: bool | None, within_secs: float) -> Place | None:
    """What JAX finds, where it is asked for; None: left out, which asks on a TPU host, and goes on alone there."""
    if distributed is False or (distributed is None and not is_tpu_host()):
        return None
    try:
        return detected_place(within_secs)
    except FlagError as error:
        if distributed:
            raise
        print(f"this TPU host is taken for the only one: {error}", file=sys.stderr, flush=True)
        return None


def given_flags() -> Facts:
    """The flags that this process was given, without those of its own: the others must have been given the same."""
    names = sorted(set(flags.FLAGS) - _OWN_FLAGS)
    return {f"--{name}": flags.FLAGS[name].value for name in names if flags.FLAGS[name].present}


@contextlib.contextmanager
def first_alone_prints() -> Iterator[None]:
    """Within the block what processes other than the first print goes nowhere; errors that end it are said after it."""
    if not jax.distributed.is_initialized() or jax.process_index() == 0:  # the second needs all devices
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _join(place: Place, facts: Facts, start_secs: float, lost_secs: float) -> None:
    with caught() as interrupts:  # an exception in one process would leave the others waiting for it
        interrupts.leave_at_once()
    links = meet(place, facts, start_secs)
    start_watch(links, place.process_id, lost_secs)
    _keep_libraries_from_stdout()
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from `rat_jax.interrupts`
    try:
        jax.distributed.initialize(
            place.address,
            place.num_processes,
            place.process_id,
            place.local_device_ids,
            initialization_timeout=int(start_secs),
            heartbeat_timeout_seconds=int(max(_JAX_HEARTBEAT_SECS, 2 * lost_secs)),
        )
    except (RuntimeError, ValueError) as error:
        raise MeetingError(f"JAX's service at {place.address} did not start: {error}") from None


def _keep_libraries_from_stdout() -> None:
    """What libraries print without Python goes to stderr: JAX's collectives on CPUs greet their peers, amid results."""
    sys.stdout.flush()
    results = open(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1)  # noqa: SIM115
    os.dup2(2, 1)
    sys.stdout = results


def _versions() -> dict[str, str]:
    """Of what computes; equal sources compile the same programs."""
    root, digest = pathlib.Path(__file__).parents[2], hashlib.sha256()
    for file in sorted([*root.glob("rat_jax/**/*.py"), *root.glob("pallas_kernels/**/*.py")]):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "flax": flax.__version__,
        "rat_jax": f"sources {digest.hexdigest()[:12]}",
    }
