"""Every part of the rule against its definition in NumPy, and draws against their distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rat_jax.sampling.sampling_params import SMALLEST, SamplingParams, adjust_logits, choose_tokens

VOCAB = 50
LOGITS = np.random.default_rng(0).normal(0, 2, (4, VOCAB)).astype(np.float32)
SEEN = np.random.default_rng(1).random((4, VOCAB)) < 0.3


def rule(**parts) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "top_k": None, "top_p": None, "repetition_penalty": None} | parts)


def defined(logits: np.ndarray, seen: np.ndarray, rule: SamplingParams) -> np.ndarray:
    """The definition, a token at a time, for one row."""
    logits = logits.astype(np.float64)
    if rule.repetition_penalty is not None:
        for i in np.flatnonzero(seen):
            logits[i] = logits[i] / rule.repetition_penalty if logits[i] > 0 else logits[i] * rule.repetition_penalty
    if rule.temperature is not None:
        logits = logits / rule.temperature
    if rule.top_k is not None:
        for i in np.argsort(-logits)[rule.top_k :]:
            logits[i] = -np.inf
    if rule.top_p is not None:
        probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        reached = 0.0
        for i in np.argsort(-logits):
            if reached >= rule.top_p:
                logits[i] = -np.inf
            reached += probabilities[i]
    return logits


RULES = {
    "temperature": rule(temperature=0.3),
    "penalty": rule(repetition_penalty=1.7),
    "greedy-penalty": rule(temperature=None, repetition_penalty=1.7),
    "top-1": rule(top_k=1),
    "top-7": rule(top_k=7),
    "top-more-than-all": rule(top_k=VOCAB + 9),
    "top-p": rule(top_p=0.6),
    "top-p-tiny": rule(top_p=1e-6),
    "all": rule(temperature=1.6, top_k=20, top_p=0.8, repetition_penalty=1.3),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_adjusted_logits_equal_the_definition(rule):
    adjusted = np.asarray(adjust_logits(jnp.asarray(LOGITS), jnp.asarray(SEEN), rule))
    expected = np.array([defined(*row, rule) for row in zip(LOGITS, SEEN, strict=True)])
    np.testing.assert_array_equal(np.isfinite(adjusted), np.isfinite(expected))
    np.testing.assert_allclose(adjusted, expected, rtol=1e-5)


def test_equal_logits_stay_or_go_together():
    logits = jnp.array([[3.0, 1.0, 2.0, 2.0, 0.0]])
    kept = np.isfinite(adjust_logits(logits, None, rule(top_k=2)))
    np.testing.assert_array_equal(kept, [[True, False, True, True, False]])
    kept = np.isfinite(adjust_logits(logits, None, rule(top_p=0.7)))  # the likeliest has 0.53
    np.testing.assert_array_equal(kept, [[True, False, True, True, False]])


def test_greedy_takes_the_largest_logit():
    keys = jax.random.split(jax.random.key(0), 4)
    tokens = choose_tokens(jnp.asarray(LOGITS), None, keys, rule(temperature=None))
    np.testing.assert_array_equal(tokens, LOGITS.argmax(axis=-1))


@pytest.mark.parametrize("rule", [rule(temperature=SMALLEST), rule(top_p=SMALLEST), rule(repetition_penalty=1e3)])
def test_the_most_extreme_settings_are_followed(rule):
    keys = jax.random.split(jax.random.key(0), 4)
    tokens = choose_tokens(jnp.asarray(1e4 * LOGITS), jnp.zeros_like(SEEN), keys, rule)
    np.testing.assert_array_equal(tokens, LOGITS.argmax(axis=-1))


def test_draws_follow_the_distribution():
    draws = 20_000
    keys = jax.random.split(jax.random.key(0), draws)
    chosen = rule(temperature=1.3, top_k=8)
    tokens = choose_tokens(jnp.tile(LOGITS[:1], (draws, 1)), None, keys, chosen)
    frequencies = np.bincount(tokens, minlength=VOCAB) / draws
    logits = defined(LOGITS[0], SEEN[0], chosen)
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert (frequencies[probabilities == 0] == 0).all()
    deviation = np.sqrt(probabilities * (1 - probabilities) / draws)
    assert (np.abs(frequencies - probabilities) <= 4 * deviation).all()
