"""What the benchmark of scoring counts; nothing is computed."""

import numpy as np
import pytest

from benchmarks import scoring as benchmark
from rat_jax.evaluation import scoring
from rat_jax.evaluation.scoring import Scorer
from tests.small import bigram_model

V = 31


@pytest.mark.parametrize("kind", ["windows", "pairs", "options"])
def test_requests_are_the_same_at_each_run_and_their_host_part_needs_no_model(kind):
    requests, again = (benchmark.draw_requests(kind, 32, 64, V) for _ in range(2))
    assert len(requests) == {"windows": 1, "pairs": 32, "options": 128}[kind]
    for one, other in zip(requests, again, strict=True):
        np.testing.assert_array_equal(np.hstack(one), np.hstack(other))
    scorers = []

    def make_scorer():
        scorers.append(Scorer(bigram_model()[0], None, context_length=64, batch_tokens=512))
        return scorers[-1]

    computing = scoring.batch_scores, scoring.context_scores
    assert benchmark.host_seconds(make_scorer, requests) > 0
    assert (scoring.batch_scores, scoring.context_scores) == computing
    assert scorers[0].num_tokens > 0


def test_tokens_are_counted_without_padding_and_without_sharing():
    context = np.zeros(10, np.int64)
    assert benchmark.num_tokens([(context, np.zeros(3, np.int64)), (context, np.zeros(1, np.int64))]) == 12 + 10
    assert benchmark.num_tokens([np.zeros(7, np.int64), np.zeros(2, np.int64)]) == 9
