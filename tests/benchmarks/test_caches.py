"""Caches that are put at a position, against caches that have read their way there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.caches import random_contents
from tests.small import PATTERNS, small_model

# The kinds of the hybrid are here by themselves.
MARKED = [pytest.param(pattern, marks=[pytest.mark.slow] * (len(pattern) > 1)) for pattern in PATTERNS]


@pytest.mark.parametrize("pattern", MARKED, ids="+".join)
def test_positions_are_those_of_rows_that_were_read(pattern):
    decoder = small_model(pattern).decoder()
    module = decoder.layout.merge(decoder.arrays)
    read = decoder.init_cache(2, capacity=24)
    contents = random_contents(jax.eval_shape(lambda: read))
    for position in range(1, 18):
        _, read = decoder.extend(jnp.ones((2, 1), jnp.int32), read)
        if position not in (3, 17):
            continue
        got = contents.at(jnp.int32(position))
        for (path, value), expected in zip(
            jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(read), strict=True
        ):
            name = jax.tree_util.keystr(path)
            assert value.shape == expected.shape and value.dtype == expected.dtype, name
            if jnp.issubdtype(value.dtype, jnp.integer):
                np.testing.assert_array_equal(value, expected, err_msg=name)
        assert 0 < module.step_bytes(got, position) <= sum(x.nbytes for x in jax.tree.leaves(got))
