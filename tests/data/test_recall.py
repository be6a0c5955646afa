"""The recall task: what a document holds, and that a prepared corpus has one document a record."""

import dataclasses

import numpy as np
import pytest

from configs import recall as recall_config
from rat_jax.config import config_from_dict
from rat_jax.data import DataError
from rat_jax.data.pipeline import ValidationData
from rat_jax.data.prepare import Settings, prepare
from rat_jax.data.recall import (
    DOCUMENT_TOKENS,
    END,
    FAR_QUERIES,
    NEAR_QUERIES,
    VOCAB_SIZE,
    recall_documents,
)
from rat_jax.data.sources import ReadOptions, parse_source


def test_documents_ask_for_every_key_once_inside_or_far_beyond_the_windows():
    documents = np.stack(list(recall_documents(50)))
    assert documents.shape == (50, DOCUMENT_TOKENS - 1)
    assert 0 < documents.min() <= documents.max() < VOCAB_SIZE
    for document in documents:
        pairs = {(i - 2) // 4: (i - 2) % 4 for i in document[:8]}
        queries = [*NEAR_QUERIES, *FAR_QUERIES]
        assert sorted(pairs) == sorted(document[queries] - 34) == list(range(8))
        assert all(document[at + 1] - 42 == pairs[document[at] - 34] for at in queries)
        assert (document[16:72] == 1).all()
        places = {key: place for place, key in enumerate((document[:8] - 2) // 4)}
        distances = [at - places[document[at] - 34] for at in queries]
        assert min(distances[:4]) >= 1
        assert max(distances[:4]) <= 14
        assert min(distances[4:]) >= 65
    np.testing.assert_array_equal(documents, list(recall_documents(50)))


def test_records_of_the_config_are_documents(tmp_path):
    config = config_from_dict(recall_config.get_config("rnn"))
    settings = Settings(
        source=("recall:200",),
        validation_source=(),
        validation_fraction=0.2,
        tokenizer=f"ids:{VOCAB_SIZE}:{END}",
        eos_token=None,
        field="text",
        document_separator=None,
        invalid_utf8="refuse",
    )
    prepare(settings, tmp_path / "recall", num_workers=0, overwrite=False)
    data = dataclasses.replace(config.data, path=str(tmp_path / "recall"))
    for batch in ValidationData(data, vocab_size=config.model.vocab_size):
        counts = batch.loss_weights.any(axis=1)
        tokens = batch.tokens[counts]
        assert tokens.shape[1] == DOCUMENT_TOKENS
        assert (tokens[:, -1] == END).all()
        assert (tokens[:, :-1] != END).all()
        queries = np.isin(np.arange(DOCUMENT_TOKENS), [*NEAR_QUERIES, *FAR_QUERIES])
        assert (batch.loss_weights[counts] == queries).all()


def test_number_of_documents_is_named():
    with pytest.raises(DataError, match="source recall:many: what stands after the colon is the number of documents"):
        parse_source("recall:many", ReadOptions("text", None, "refuse"))
