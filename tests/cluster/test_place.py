"""Which process of a job this one is, and which cards of its node are its own."""

import pytest

from rat_jax.cluster import launch
from rat_jax.cluster.place import Place, detected_place, local_device_ids, place_of_flags
from rat_jax.program import FlagError

JAX_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_LOCAL_DEVICE_IDS", "JAX_COORDINATOR_PORT")
SLURM_JOB = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in (*JAX_VARIABLES, *SLURM_JOB):
        monkeypatch.delenv(name, raising=False)


def test_flags_name_the_place():
    assert place_of_flags(None, None, None) is None
    assert place_of_flags("host:80", 1, 0) is None
    place = place_of_flags("host:80", 3, 2)
    assert place == Place("host:80", 3, 2, ())
    assert (place.host, place.port) == ("host", 80)
    assert place_of_flags("[::1]:80", 3, 2).host == "::1"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("host:80", None, 1), "--coordinator_address and --process_id without --num_processes: give all three"),
        ((None, 2, None), "--num_processes without --coordinator_address and --process_id"),
        (("host:80", 2, 2), r"--process_id is 2; of --num_processes 2 it must lie in 0 \.\. 1"),
        (("host:80", 2, -1), "--process_id is -1"),
        (("host:80", 0, 0), "--num_processes is 0; it must be 1 or more"),
        (("host", 2, 0), "--coordinator_address is 'host'; it must be HOST:PORT"),
        (("host:70000", 2, 0), "--coordinator_address is 'host:70000'"),
    ],
)
def test_flags_that_do_not_fit_are_named(flags, message):
    with pytest.raises(FlagError, match=message):
        place_of_flags(*flags)


def test_slurm_is_found(monkeypatch):
    for name, value in (SLURM_JOB | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "1"}).items():
        monkeypatch.setenv(name, value)
    assert detected_place(1.0) == Place("node07:61441", 2, 1, ())
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert detected_place(1.0) is None


def test_where_nothing_is_found_the_flags_are_named():
    with pytest.raises(FlagError, match=r"--distributed: .* were not found: .* give --coordinator_address, --num_proc"):
        detected_place(1.0)


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        ({}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8"}, ()),
        ({"SLURM_TASKS_PER_NODE": "2,1", "SLURM_NODEID": "1"}, ()),
        ({"SLURM_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "3"}, (3,)),
        ({"SLURM_TASKS_PER_NODE": "2", "SLURM_LOCALID": "1", "SLURM_GPUS_ON_NODE": "8"}, (4, 5, 6, 7)),
        ({"SLURM_TASKS_PER_NODE": "2", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (2, 3)),
        # Bound by --gpus-per-task: the second task sees one card, which has number 0 there.
        (
            {
                "SLURM_TASKS_PER_NODE": "8",
                "SLURM_LOCALID": "1",
                "SLURM_GPUS_ON_NODE": "8",
                "CUDA_VISIBLE_DEVICES": "1",
            },
            (),
        ),
        ({"SLURM_TASKS_PER_NODE": "8", "JAX_LOCAL_DEVICE_IDS": "5"}, None),
        ({"SLURM_TASKS_PER_NODE": "?"}, None),
    ],
)
def test_tasks_of_slurm_share_the_cards_of_a_node(variables, devices):
    assert local_device_ids({"SLURM_LOCALID": "0"} | variables) == devices


def test_cards_that_do_not_divide_are_named():
    with pytest.raises(FlagError, match="the node has 8 cards for 3 tasks of SLURM, which do not divide"):
        local_device_ids({"SLURM_LOCALID": "0", "SLURM_TASKS_PER_NODE": "3", "SLURM_GPUS_ON_NODE": "8"})


@pytest.mark.parametrize(("processes", "devices"), [("1", ()), ("4", None)])
def test_one_process_of_open_mpi_has_all_cards(processes, devices):
    assert local_device_ids({"OMPI_COMM_WORLD_LOCAL_SIZE": processes}) == devices


@pytest.mark.parametrize(
    ("distributed", "on_tpu", "asks"),
    [(None, False, False), (None, True, True), (False, True, False), (True, False, True)],
)
def test_what_asks_for_other_hosts(monkeypatch, distributed, on_tpu, asks):
    place = Place("host:80", 2, 0, ())
    monkeypatch.setattr(launch, "is_tpu_host", lambda: on_tpu)
    monkeypatch.setattr(launch, "detected_place", lambda within_secs: place)
    assert launch._found_place(distributed, 1.0) == (place if asks else None)


def test_a_tpu_host_that_finds_no_other_says_so(monkeypatch, capsys):
    monkeypatch.setattr(launch, "is_tpu_host", lambda: True)
    assert launch._found_place(None, 1.0) is None
    assert "this TPU host is taken for the only one: --distributed: " in capsys.readouterr().err
    with pytest.raises(FlagError):
        launch._found_place(True, 1.0)


def test_without_a_cluster_jax_is_to_take_all_devices():
    assert local_device_ids({}) == ()
