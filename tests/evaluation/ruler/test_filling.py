"""How large a text may be."""

import pytest

from rat_jax.evaluation.ruler.filling import TooShortError, largest_fit


@pytest.mark.parametrize(
    "count",
    [
        lambda size: 40 + 7 * size,
        lambda size: 100 + size,
        lambda size: size * size // 50 + 1,
        lambda size: 3 + 400 * (size // 9),
        lambda size: 40 + (0 if size < 50 else 7 * (size - 50)),
    ],
    ids=["line", "slow", "curve", "steps", "flat"],
)
@pytest.mark.parametrize("limit", [500, 777, 20_000])
def test_the_largest_that_fits_or_nearly(count, limit):
    looked = []

    def looking(size):
        looked.append(size)
        return count(size)

    size = largest_fit(looking, limit, least=1)
    assert count(size) <= limit
    assert count(size + 1) > limit or count(size) >= 0.995 * limit
    assert len(looked) < 30


def test_few_looks_for_what_grows_in_proportion():
    looked = []
    largest_fit(lambda size: looked.append(size) or 300 + 21 * size, 131_072, least=1)
    assert len(looked) <= 4


def test_the_least_size_may_be_the_largest():
    assert largest_fit(lambda size: 10 * size, 10, least=1) == 1
    with pytest.raises(TooShortError) as caught:
        largest_fit(lambda size: 10 * size, 9, least=1)
    assert caught.value.num_tokens == 10
