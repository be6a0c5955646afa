"""Corpora that several test files read."""

import io

import pytest

from rat_jax.data.prepare import Settings, prepare
from rat_jax.data.sources import ReadOptions

TEXTS = [
    f"document {i}: the quick brown fox jumps over {i * 7919} lazy dogs, naïve café €{i} 🦊\n" * 3 for i in range(40)
]


@pytest.fixture
def read_options() -> ReadOptions:
    return ReadOptions(field="text", document_separator=None, invalid_utf8="refuse")


@pytest.fixture
def text_folder(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03d}.txt").write_text(text)
    return folder


@pytest.fixture
def settings(text_folder) -> Settings:
    """Of a small corpus of bytes; tests change fields with `dataclasses.replace`."""
    return Settings(
        source=(str(text_folder),),
        validation_source=(),
        validation_fraction=0.3,
        tokenizer="bytes",
        eos_token=None,
        field="text",
        document_separator=None,
        invalid_utf8="refuse",
    )


@pytest.fixture
def corpus(settings, tmp_path):
    return prepare(settings, tmp_path / "corpus", num_workers=0, overwrite=False)


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    """A SentencePiece model with LLaMA-2's settings: BPE, byte fallback, whitespace kept, EOS 2."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()
