"""Worker processes: signals of the group do not reach them, and none is left behind."""

import os
import signal
import subprocess
import sys

import pytest

from rat_jax.data import DataError, workers
from tests.commands import ends, import_path

PARENT = """
import multiprocessing, os, signal, sys, time
from rat_jax.data.workers import follow_parent, shielded

def work(ready):
    follow_parent()
    ready.set()
    time.sleep(60)

if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    with shielded():
        worker = spawn.Process(target=work, args=(ready,))
        worker.start()
    for number in (signal.SIGINT, signal.SIGTERM):  # one that is starting, too
        os.kill(worker.pid, signal.SIGINT)
        os.system(f"kill -TERM {worker.pid}")
    assert ready.wait(30)
    os.system(f"kill -TERM {worker.pid}; kill -INT {worker.pid}")
    time.sleep(0.1)
    assert worker.is_alive()
    print(worker.pid, flush=True)
    if sys.stdin.readline() == "end\\n":
        worker.terminate()
        worker.join()
        print(worker.exitcode, flush=True)
    time.sleep(60)
"""


def start(file, *arguments, **options):
    environment = os.environ | {"PYTHONPATH": import_path(), "JAX_PLATFORMS": "cpu"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(file), *arguments], env=environment, **pipes, **options)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="this system does not tell who sent a signal")
@pytest.mark.parametrize("killed", [False, True])
def test_a_worker_outlives_signals_but_not_its_parent(tmp_path, killed):
    (tmp_path / "parent.py").write_text(PARENT)
    parent = start(tmp_path / "parent.py")
    pid = int(parent.stdout.readline())
    if not killed:  # as multiprocessing does it
        parent.stdin.write("end\n")
        parent.stdin.flush()
        assert int(parent.stdout.readline()) == -signal.SIGTERM
    parent.kill()
    parent.wait()  # its pipes are the worker's, too
    parent.stdin.close()
    parent.stdout.close()
    assert ends(pid)


NO_GUARD = """
import pathlib, sys
from rat_jax.data.encoding import Encoder, encode
from rat_jax.data.tokenizer import ByteTokenizer
from rat_jax.data.workers import check_main

check_main(2)
print(list(encode([("train", "a" * 10)], Encoder(ByteTokenizer(), 0.1), num_workers=2)))
"""


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    (tmp_path / "no_guard.py").write_text(NO_GUARD)
    script = start(tmp_path / "no_guard.py", stderr=subprocess.PIPE)
    said = script.communicate()[1]
    assert script.returncode == 1
    assert said.splitlines()[-1].startswith("rat_jax.data.DataError: a process that encodes died: workers import")
    assert 'no_guard.py, which starts them again: write what it does below `if __name__ == "__main__":`' in said
    assert said.count("Traceback") == 1  # of the script, which does not catch it


def test_a_program_that_is_no_file_is_told_so(monkeypatch):
    main = type(sys)("__main__")
    main.__file__ = "<stdin>"
    monkeypatch.setitem(sys.modules, "__main__", main)
    workers.check_main(0)
    with pytest.raises(DataError, match=r"num_workers is 2, .* <stdin> is no file: write the program to a file"):
        workers.check_main(2)


def test_available_cpus_are_those_of_the_affinity():
    if not hasattr(os, "sched_setaffinity"):
        assert workers.available_cpus() == os.cpu_count()
        return
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert workers.available_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("code", "words"), [(-9, "killed, perhaps for want of memory"), (-11, "ended by SIGSEGV"), (1, "exit code 1")]
)
def test_deaths_in_words(code, words):
    assert words in workers.describe_death(code)
