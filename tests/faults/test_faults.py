"""Some faults of each sort; `make faults` injects them all."""

import pytest

from tests.faults import campaign, fuzz, jobs, live
from tests.faults.base import Base
from tests.faults.damage import KINDS

FILES = [
    "array file of the newest checkpoint changed",
    "value in the newest manifest changed",
    "all manifests gone",
    "checkpoint under the number of another step",
    "lines of the log damaged",
    "a token replaced by another of the vocabulary",
    "header of a token file changed",
    "a folder where a file should be",
]
# Quicker tests of the same: other mixtures in tests/training/test_mixture.py, rows in tests/data/test_packed_rows.py.
OF_OTHER_CORPORA = [
    "what a config says of several corpora changed",
    "corpora of a mixture elsewhere",
    "bytes of packed rows changed",
    "packed rows prepared again from the same documents",
]
# Quicker tests of the same: a second process at a workdir in tests/checkpoints/test_owner.py and
# tests/training/test_run.py, a killed one in tests/training/test_resume.py.
NUM_LIVE_STEPS = 90  # of 600 in `make faults`: a checkpoint every 30
LIVE = ["killed while it saves", "started a second time"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Base.make(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(base, name):
    verdict = campaign.judge(base, next(kind for kind in KINDS if kind.name == name), seed=0)
    assert verdict.is_right, verdict


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_OTHER_CORPORA)
def test_damaged_files_of_mixtures_and_rows(tmp_path_factory, name):
    kind = next(kind for kind in KINDS if kind.name == name)
    base = Base.make(tmp_path_factory.getbasetemp() / kind.reads, kind.reads)
    verdict = campaign.judge(base, kind, seed=0)
    assert verdict.is_right, verdict


@pytest.mark.slow
@pytest.mark.parametrize("name", LIVE)
def test_a_live_run(tmp_path_factory, name):
    reference = live.make_reference(tmp_path_factory.getbasetemp() / "live", NUM_LIVE_STEPS)
    kind = next(kind for kind in live.LIVE_KINDS if kind.name == name)
    verdict = live.judge_live(reference, kind, seed=0, num_steps=NUM_LIVE_STEPS)
    assert verdict.is_right, verdict


def test_readers_of_damaged_bytes(base, tmp_path):
    for reader in fuzz.readers(base, tmp_path):
        outcomes, wrong = fuzz.fuzz(reader, first_seed=0, count=25)
        assert not wrong, wrong[0]
        assert outcomes.total() == 25


def test_the_campaign_is_as_large_as_it_says():
    kinds = [*KINDS, *live.LIVE_KINDS, *jobs.JOB_KINDS]
    assert sum(kind.times for kind in kinds) >= 500
    assert sum(kind.times for kind in live.LIVE_KINDS) >= 80
    assert {reads: sum(kind.times for kind in KINDS if kind.reads == reads) for reads in ("mixture", "packed")} == {
        "mixture": 83,
        "packed": 64,
    }
    assert sum(kind.times for kind in jobs.JOB_KINDS) == 19
    assert len({kind.name for kind in kinds}) == len(kinds) >= 25
    assert max(kind.times for kind in kinds) <= 20
