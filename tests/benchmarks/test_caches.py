"""Caches that are put at a position, against caches that have read their way there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.caches import random_contents
from rat_jax.decoder import DecoderModule
from tests.small import PATTERNS, small_model


@pytest.mark.parametrize("position", [3, 17])
@pytest.mark.parametrize("pattern", PATTERNS, ids="+".join)
def test_positions_are_those_of_rows_that_were_read(pattern, position):
    model = small_model(pattern)
    decoder = DecoderModule(model)
    empty = model.init_cache(2, capacity=24)
    _, read = model.extend(jnp.ones((2, position), jnp.int32), empty)
    got = decoder.cache_at(random_contents(jax.eval_shape(lambda: empty)), position)
    for (path, value), expected in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(read), strict=True):
        assert value.shape == expected.shape and value.dtype == expected.dtype
        if jax.tree_util.keystr(path).endswith("token_index"):  # of no meaning in slots that nothing was written to
            value, expected = (np.where(x < position, np.maximum(x, 0), 0) for x in (value, expected))
        if jnp.issubdtype(value.dtype, jnp.integer):
            np.testing.assert_array_equal(value, expected, err_msg=jax.tree_util.keystr(path))
    assert 0 < decoder.step_bytes(got, position) <= sum(x.nbytes for x in jax.tree.leaves(got))
