"""Where the time of a run goes."""

import pytest

from rat_jax.training.time_shares import TimeShares


def test_shares_sum_up_and_blocks_inside_count_by_themselves():
    seconds = [100.0]
    times = TimeShares(lambda: seconds[0])
    seconds[0] += 4  # steps
    with times.spent_on("validating"):
        seconds[0] += 1
        with times.spent_on("compiling"):
            seconds[0] += 3
        seconds[0] += 2
    assert times.take() == {"steps": 0.4, "validating": pytest.approx(0.3), "compiling": 0.3}
    with pytest.raises(ValueError, match="no data"), times.spent_on("data"):
        seconds[0] += 10
        raise ValueError("no data")
    assert times.take() == {"steps": 0.0, "data": 1.0}
    assert times.take() == {}
    assert times.summary() == "data 50.0%, steps 20.0%, validating 15.0%, compiling 15.0%"
