"""Caches that the benchmarks put at a position, against caches that have read their way there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.caches import at_position, bytes_read, random_contents
from tests.small import PATTERNS, small_model


@pytest.mark.parametrize("position", [3, 17])
@pytest.mark.parametrize("pattern", [*PATTERNS, ("rattention",)])
def test_places_are_those_of_rows_that_were_read(pattern, position):
    model = small_model(pattern)
    empty = model.init_cache(2, capacity=24)
    _, read = model.extend(jnp.ones((2, position), jnp.int32), empty)
    got = at_position(random_contents(jax.eval_shape(lambda: empty)), position, model.config.rat.chunk_size)
    for (path, value), expected in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(read), strict=True):
        assert value.shape == expected.shape and value.dtype == expected.dtype
        if jax.tree_util.keystr(path).endswith("order"):  # of no meaning in slots that nothing was written to
            value, expected = (np.where(x < position, np.maximum(x, 0), 0) for x in (value, expected))
        if jnp.issubdtype(value.dtype, jnp.integer):
            np.testing.assert_array_equal(value, expected, err_msg=jax.tree_util.keystr(path))
    assert 0 < bytes_read(got, position, model.config.rat.chunk_size) < sum(x.nbytes for x in jax.tree.leaves(got))
