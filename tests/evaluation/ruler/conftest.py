"""Tokenizers and settings that the tests of RULER share."""

import dataclasses

import pytest

from rat_jax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, train_bpe
from rat_jax.evaluation.ruler.examples import Settings
from rat_jax.evaluation.ruler.haystacks import Essay
from rat_jax.evaluation.ruler.templates import OWN
from rat_jax.evaluation.ruler.words import GeneratedWords
from tests.data.conftest import sentencepiece_model  # noqa: F401

# Sentences of their own, each with its number, so that a test can tell which a prompt holds.
ESSAY = " ".join(f'Sentence {number} is about the {number * number}th of "many things".' for number in range(600))


@pytest.fixture(scope="session")
def tokenizers(sentencepiece_model) -> dict[str, Tokenizer]:  # noqa: F811
    return {
        "bytes": ByteTokenizer(),
        "bpe": train_bpe([ESSAY, OWN.noise, "VAR ABC = 12345, 1. word 2. word ..."], 400),
        "sentencepiece": SentencePieceTokenizer(sentencepiece_model, 2),
    }


@pytest.fixture(scope="session")
def settings():
    """Makes settings of short prompts; arguments change fields."""
    base = Settings(
        context_length=2048,
        split="validation",
        seed=0,
        templates=OWN,
        words=GeneratedWords(),
        essay=Essay("essay", ESSAY),
        num_depths=None,
        answer_tokens=None,
        bos=False,
    )
    return lambda **changes: dataclasses.replace(base, **changes)
