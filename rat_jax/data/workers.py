"""Worker processes: they leave signals to their parent, end with it, and say why they could not start.

A signal to the whole process group (Ctrl-C, a scheduler) reaches workers too. One that died of it would take the batch
that its parent is waiting for along, so workers have SIGINT and SIGTERM blocked from birth: processes and threads
inherit the mask of the thread that starts them. SIGTERM from the parent itself, as `multiprocessing` ends workers, is
obeyed where the system tells who sent it.
"""

import contextlib
import multiprocessing
import multiprocessing.process
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
from collections.abc import Iterator

from rat_jax.data import DataError

_NO_MAIN_GUARD = 78  # exit code of a worker that was about to run its parent's script again (EX_CONFIG)
_TELLS_SENDER = hasattr(signal, "sigwaitinfo")
_SHIELDED = {signal.SIGINT, signal.SIGTERM} if _TELLS_SENDER else {signal.SIGINT}


def available_cpus() -> int:
    """CPUs that this process may run on, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Processes and threads that are started in this block, by this thread, do not get signals of the group."""
    multiprocessing.resource_tracker.ensure_running()  # its start would unblock them again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SHIELDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent() -> None:
    """Called in a new worker that was started `shielded`: it ends with its parent, however that ends."""
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    if _TELLS_SENDER:
        threading.Thread(target=_obey_parent, name="sigterm-watch", daemon=True).start()


def check_main(num_workers: int) -> None:
    """Called first by whatever starts workers. New workers import the file of the running program.

    Where that file is a script that works without `if __name__ == "__main__":`, the new worker comes here, too. It
    ends quietly, and its parent says why (`describe_death`).

    Raises:
      DataError: if there are to be workers, but the program is not in a file that they could import.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing itself asks
        os._exit(_NO_MAIN_GUARD)
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if num_workers == 0 or file is None or main.__spec__ is not None:
        return
    if not os.path.exists(os.path.join(multiprocessing.process.ORIGINAL_DIR, file)):
        raise DataError(
            f"num_workers is {num_workers}, but workers import the file of the running program, and {file} is no file: "
            f"write the program to a file, or set num_workers to 0"
        )


def describe_death(exit_code: int) -> str:
    """Why a worker ended, for people."""
    if exit_code == _NO_MAIN_GUARD:
        script = getattr(sys.modules["__main__"], "__file__", "the script")
        return (
            f"workers import {script}, which starts them again: write what it does below `if __name__ == "
            f'"__main__":`, or set num_workers to 0'
        )
    if exit_code == -signal.SIGKILL:
        return "it was killed, perhaps for want of memory: use fewer num_workers"
    if exit_code < 0:
        return f"it was ended by {signal.Signals(-exit_code).name}"
    return f"it ended with exit code {exit_code}, and what it said is above"


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.kill(os.getpid(), signal.SIGTERM)
