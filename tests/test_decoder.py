"""A decoder: its steps are compiled, and rows of its caches can be copied."""

import jax.numpy as jnp
import numpy as np
import pytest

from rat_jax.decoder import DecoderModule
from tests.small import small_model, with_random_scales


@pytest.mark.usefixtures("annotations_unchecked")
@pytest.mark.parametrize("tokens", [jnp.ones((3,), jnp.int32), jnp.ones((1, 3))], ids=["one axis", "no whole numbers"])
def test_what_are_no_tokens_is_refused(tokens):
    model = small_model(("rnn",))
    decoder = model.decoder()
    for call in (model, lambda x: decoder.extend(x, decoder.init_cache(1, 8)), model.hidden):
        with pytest.raises(ValueError, match=r"tokens must be whole numbers \[B, T\]"):
            call(tokens)


def test_a_step_is_compiled_once(monkeypatch):
    decoder, token = small_model(("rnn",)).decoder(), jnp.array([[3]])
    first, cache = decoder.extend(token, decoder.init_cache(1, 8))
    monkeypatch.setattr(DecoderModule, "hidden", lambda *arguments: pytest.fail("a step runs as Python again"))
    second, _ = decoder.extend(token, cache)
    assert np.abs(first - second).max() > 0


def test_several_continuations_of_a_prompt():
    decoder = small_model(("rat", "local_attention")).decoder()
    prompts = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 9)))
    _, cache = decoder.extend(prompts, decoder.init_cache(2, 16))
    copies = cache.take_rows(jnp.array([1, 1, 0]))
    logits, _ = decoder.extend(jnp.array([[3], [4], [3]]), copies)
    for row, (prompt, token) in enumerate([(1, 3), (1, 4), (0, 3)]):
        alone, _ = decoder.extend(jnp.array([[token], [token]]), cache)
        np.testing.assert_allclose(logits[row], alone[prompt], atol=1e-5)
    assert np.abs(logits[0] - logits[1]).max() > 0.1


@pytest.mark.parametrize("pattern", [("rat", "local_attention"), ("gated_deltanet", "rnn")], ids="-".join)
def test_steps_hand_layers_of_other_widths_their_first_products(pattern):
    model = with_random_scales(small_model(pattern, num_layers=4))
    decoder = model.decoder()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 7)))
    want, cache = model(tokens), decoder.init_cache(2, 8)
    for t in range(tokens.shape[1]):
        logits, cache = decoder.extend(tokens[:, t : t + 1], cache)
        np.testing.assert_allclose(logits[:, 0], want[:, t], atol=1e-4 * np.abs(want).max())
