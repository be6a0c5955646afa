"""The meeting at a job's start, of processes that are threads here."""

import concurrent.futures
import socket
import time

from rat_jax.cluster.meeting import MeetingError, meet
from rat_jax.cluster.place import Place
from rat_jax.errors import ProcessLost
from tests.cluster.job import free_port

FACTS = {"jax": "1", "config.pattern": ("rat",), "config.seed": None}


def outcomes(*processes, within_secs=10.0, of=None, port=None):
    """What `meet` gives or raises, of (process_id, facts) at once."""
    port = port or free_port()

    def one(number, facts, count=None):
        try:
            return meet(Place(f"localhost:{port}", count or of or len(processes), number, None), facts, within_secs)
        except (MeetingError, ProcessLost) as error:
            return error

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return [future.result(60) for future in [pool.submit(one, *process) for process in processes]]


def close(*links):
    for link in links:
        link.close()


def test_all_meet_and_can_speak():
    first, second, third = outcomes((0, FACTS), (1, FACTS), (2, FACTS))
    assert (set(first), set(second), set(third)) == ({1, 2}, {0}, {0})
    first[2].send({"a": 1})
    assert third[0].receive() == [{"a": 1}]
    third[0].send({"b": 2})
    assert first[2].receive() == [{"b": 2}]
    close(*first.values(), *second.values(), *third.values())


def test_the_missing_are_named_on_all():
    start = time.monotonic()
    first, other = outcomes((0, FACTS), (2, FACTS), within_secs=1.0, of=4)
    assert time.monotonic() - start < 8
    for error in (first, other):
        assert isinstance(error, ProcessLost)
        assert "processes 1, 3 of 4 did not come to localhost" in str(error)
        assert "within 1 s" in str(error)


def test_a_first_process_that_is_not_there_is_named():
    (error,) = outcomes((1, FACTS), within_secs=0.5, of=2)
    assert isinstance(error, ProcessLost)
    assert "process 0 was not reached at localhost:" in str(error)
    assert "within 0.5 s: Connection refused" in str(error)


def test_a_difference_names_process_field_and_values():
    first, second, third = outcomes((0, FACTS), (1, FACTS), (2, FACTS | {"jax": "2"}))
    for error in (first, second, third):
        assert isinstance(error, MeetingError)
        assert "process 2 (" in str(error)
        assert "differs from process 0: jax is '2' there, '1' here" in str(error)


def test_two_that_say_they_are_the_same():
    """The first of them stays, the other is told; then the one that is missing is named."""
    first, *twins = outcomes((0, FACTS), (1, FACTS), (1, FACTS), within_secs=2.0, of=3)
    assert "process 2 of 3 did not come" in str(first)
    assert {type(twin) for twin in twins} == {MeetingError, ProcessLost}
    assert any("process 1 is there already: each needs a --process_id of its own" in str(twin) for twin in twins)


def test_numbers_of_processes_that_differ():
    first, second = outcomes((0, FACTS, 2), (1, FACTS, 3), within_secs=1.0)
    assert "process 1 was given --num_processes 3, and process 0 2" in str(second)
    assert "process 1 of 2 did not come" in str(first)


def test_others_that_connect_are_sent_away():
    """JAX's own client of an earlier job, say, or somebody who looks for open ports."""
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(outcomes, (0, FACTS), of=2, port=port)
        until = time.monotonic() + 10
        while True:
            try:
                stranger = socket.create_connection(("localhost", port), timeout=5)
                break
            except OSError:
                assert time.monotonic() < until
        with stranger:
            stranger.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n")
            assert stranger.recv(100) == b""
        (second,) = outcomes((1, FACTS), of=2, port=port)
        (links,) = first.result(60)
    close(links[1], second[0])


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as server:
        (error,) = outcomes((0, FACTS), of=2, port=server.getsockname()[1])
    assert isinstance(error, MeetingError)
    assert "Address already in use; choose another port" in str(error)
