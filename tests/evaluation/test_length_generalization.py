"""Losses beyond the training length: chunks with caches give what one pass gives, in memory that does not grow."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from flax import nnx

from rat_jax.checkpoints.store import LoadedModel
from rat_jax.config import MeshConfig
from rat_jax.data.corpus import Corpus
from rat_jax.data.pipeline import Batch
from rat_jax.decoder import Decoder, DecoderModule
from rat_jax.evaluation import length_generalization, length_report, results
from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.length_generalization import (
    Chunk,
    LengthGeneralization,
    Reader,
    bucket_edges,
    chunks,
    measure,
    positions_of,
    read_chunk,
    start_reading,
)
from rat_jax.evaluation.perplexity import evaluate
from rat_jax.evaluation.position_sums import PositionSums
from rat_jax.memory import tree_bytes
from rat_jax.mixers import MIXERS
from rat_jax.model import LanguageModel
from rat_jax.ops import attention_xla
from rat_jax.sharding import make_mesh
from tests.small import SETTINGS, small_model
from tests.tiny_run import make_corpus, tiny_config

CHUNK, LENGTH, VOCAB = 8, 27, 31  # the last chunk is not full
# Every kind with positions where it has them, the models of the papers, and all that can do without.
PATTERNS = {
    **{kind: (kind,) for kind in MIXERS},
    "rat_swa": ("rat", "local_attention"),
    "rat_swa_nope": ("rat", "local_attention"),
    "attention_rattention_nope": ("attention", "rattention"),
    "attention_nope_rattention": ("attention", "rattention"),
}
MESH = make_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1])


def make_model(pattern: tuple[str, ...], without_positions: tuple[str, ...] = ()) -> LanguageModel:
    settings = {kind: MIXERS[kind].Config(**SETTINGS.get(kind, {})) for kind in pattern}
    settings |= {kind: dataclasses.replace(settings[kind], rope=False) for kind in without_positions}
    return small_model(pattern, num_layers=len(pattern), mixers=settings)


def make_batch(with_documents: bool) -> Batch:
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, VOCAB, (2, 3, LENGTH)).astype(np.int32)
    segment_ids = None
    if with_documents:
        segment_ids = np.sort(rng.integers(1, 4, (3, LENGTH)), axis=1).astype(np.int32)
        segment_ids[2, 20:] = 0
    weights = rng.integers(0, 2, (3, LENGTH)).astype(np.float32)
    return Batch(tokens, targets, weights, segment_ids)


def expected_sums(model: LanguageModel, batch: Batch, edges: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """From one pass over all tokens, bucket by bucket."""
    graphdef, params = nnx.split(model)
    forward = jax.jit(lambda params, tokens, segments: nnx.merge(graphdef, params)(tokens, segments))
    segment_ids = np.ones_like(batch.tokens) if batch.segment_ids is None else batch.segment_ids
    logits = np.asarray(forward(params, batch.tokens, segment_ids), np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    positions = np.zeros(batch.tokens.shape, int)
    for row, column in np.ndindex(positions.shape):
        continues = column > 0 and segment_ids[row, column] == segment_ids[row, column - 1]
        positions[row, column] = positions[row, column - 1] + 1 if continues else 0
    sums = []
    for first, end in itertools.pairwise(edges):
        inside = batch.loss_weights * ((first <= positions) & (positions < end))
        sums.append(((inside * losses).sum(), inside.sum()))
    return tuple(np.array(sums).T)


# Kinds with positions are here by themselves, or as RAttention in the last, which shows that kinds go together and that
# they can do without. One state, as Gated DeltaNet has it, is the RNN's too.
SLOW = ("gated_deltanet", "rattention", "rat_swa", "rat_swa_nope", "attention_rattention_nope")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PATTERNS])
def test_chunks_give_what_one_pass_gives_in_one_program(name):
    pattern, edges = PATTERNS[name], list(range(LENGTH + 1))  # a bucket for each position
    without_positions = pattern if name.endswith("_nope") else ("attention",) if "_nope_" in name else ()
    model = make_model(pattern, without_positions)
    with jax.set_mesh(MESH):
        reader = Reader(model, LENGTH, edges, CHUNK)
        for with_documents in (False, True):
            batch = make_batch(with_documents)
            before = read_chunk._cache_size()
            found = reader.sums(batch, MESH)
            assert read_chunk._cache_size() - before == (0 if with_documents else 1)
            loss, weight = expected_sums(model, batch, edges)
            np.testing.assert_array_equal(found.weight, weight)
            np.testing.assert_allclose(found.loss, loss, rtol=1e-4, atol=1e-4)


def chunk_memory(pattern: tuple[str, ...], capacity: int, num_tokens: int = CHUNK) -> tuple[int, int]:
    """Bytes of temporaries that the program of a chunk has, and of the cache."""
    decoder = Decoder(nnx.eval_shape(lambda: DecoderModule(make_model(pattern))))
    reading = jax.eval_shape(lambda arrays: start_reading(decoder.layout, arrays, 2, capacity, 12), decoder.arrays)
    integers, weights = (jax.ShapeDtypeStruct((2, num_tokens), dtype) for dtype in (np.int32, np.float32))
    chunk = Chunk(integers, integers, weights, integers, integers)
    embedding = jax.ShapeDtypeStruct((VOCAB, 16), np.float32)
    program = read_chunk.lower(decoder.layout, decoder.arrays, embedding, chunk, reading).compile()
    return program.memory_analysis().temp_size_in_bytes, tree_bytes(reading.cache)


# RAttention has a state too, and a window beside it.
@pytest.mark.parametrize(
    "pattern",
    [("local_attention", "rattention"), pytest.param(("rnn", "gated_deltanet"), marks=pytest.mark.slow)],
    ids="-".join,
)
def test_windows_and_states_need_the_same_memory_at_any_length(pattern):
    assert chunk_memory(pattern, 1 << 8) == chunk_memory(pattern, 1 << 16)


@pytest.mark.parametrize("name", ["attention", "rat"])
def test_where_the_cache_grows_the_rest_does_not_grow_with_it(name, monkeypatch):
    """Queries are taken in blocks of so many scores, down to blocks of 16."""
    monkeypatch.setattr(attention_xla, "_MAX_SCORES", 1 << 17)
    (short, short_cache), (long, long_cache) = (chunk_memory((name,), capacity, 128) for capacity in (1 << 8, 1 << 10))
    assert long_cache > 3.9 * short_cache
    assert long - short < long_cache - short_cache
    assert long < 1.1 * short


def test_octaves_are_relative_to_the_training_length():
    assert bucket_edges(64, 256, 1) == [0, 16, 32, 64, 128, 256]
    assert bucket_edges(64, 192, 2) == [0, 16, 24, 32, 48, 64, 96, 128, 192]
    assert bucket_edges(81, 324, 1) == [0, 20, 40, 81, 162, 324]
    assert bucket_edges(8, 32, 1) == [0, 8, 16, 32]
    assert bucket_edges(64, 40, 1) == [0, 16, 32, 40]  # shorter than the training's
    for trained, context in ((64, 64), (81, 500), (1, 7), (4096, 32768)):
        edges = [bucket_edges(trained, context, per_octave) for per_octave in (1, 2, 4)]
        assert set(edges[0]) <= set(edges[1]) <= set(edges[2])
        assert all(list(found) == sorted(set(found)) for found in edges)


def test_positions_are_counted_from_the_start_of_a_document():
    ids = np.array([[1, 1, 2, 2, 2, 0], [5, 5, 5, 5, 5, 5]])
    np.testing.assert_array_equal(positions_of(ids), [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]])


def test_chunks_hold_all_tokens_once():
    batch, edges = make_batch(with_documents=True), list(range(LENGTH + 1))
    parts = list(chunks(batch, edges, CHUNK))
    assert {part.tokens.shape for part in parts} == {(3, CHUNK)}
    for name in ("tokens", "targets", "loss_weights", "segment_ids"):
        whole = np.concatenate([getattr(part, name) for part in parts], axis=1)
        np.testing.assert_array_equal(whole[:, :LENGTH], getattr(batch, name))
        assert name in ("tokens", "targets") or not whole[:, LENGTH:].any()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return Corpus.open(make_corpus(tmp_path_factory.mktemp("lengths")))


def make_loaded(corpus, **changes) -> LoadedModel:
    settings = {"model__pattern": ("rnn",), "model__num_layers": 1, "data__segment_documents": False} | changes
    config = tiny_config(corpus.path, **settings)
    model = LanguageModel(config.model, rngs=nnx.Rngs(0))
    model.embedding[...] = model.embedding[...] * 10
    return LoadedModel(config, model, step=5, path=corpus.path.parent / "run" / "checkpoints" / "5")


@pytest.fixture(scope="module")
def loaded(corpus):
    return make_loaded(corpus)


def run(loaded, corpus, context_length: int = 64, batch_tokens: int = 64, **settings) -> LengthGeneralization:
    settings = {"max_batches": None, "chunk_tokens": 24} | settings
    return measure(loaded, corpus, MESH, context_length, batch_tokens=batch_tokens, **settings)


def test_the_loss_is_that_of_the_evaluation_at_the_same_length(loaded, corpus):
    found = run(loaded, corpus)
    expected = evaluate(loaded, corpus, MESH, 64, batch_tokens=128, max_batches=None)
    assert found.num_targets == expected.num_targets
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    for bucket in found.buckets():
        part = slice(bucket.first, bucket.last + 1)
        loss, weight = (float(x[part].sum()) for x in expected.sums)
        assert bucket.num_targets == weight
        assert bucket.loss == pytest.approx(loss / weight, rel=1e-5)
    within = [bucket for bucket in found.buckets(1) if bucket.last < 16]
    assert [bucket.loss for bucket in within] == pytest.approx([found.loss_within])
    assert found.positions == "row" and found.fraction == 1
    nats = found.loss_within * within[0].num_targets + found.loss_beyond * (found.num_targets - within[0].num_targets)
    assert nats == pytest.approx(found.loss * found.num_targets)
    programs = read_chunk._cache_size()
    part = run(loaded, corpus, max_batches=2)
    assert read_chunk._cache_size() == programs  # another measurement of the same shape compiles nothing
    assert part.fraction == evaluate(loaded, corpus, MESH, 64, batch_tokens=128, max_batches=2).fraction < 1


def test_documents_of_their_own_have_positions_of_their_own(corpus):
    found = run(make_loaded(corpus, data__segment_documents=True), corpus, context_length=128)
    assert found.positions == "document"
    assert [bucket.num_targets > 0 for bucket in found.buckets(1)] == [True, True, False, False]  # 24 tokens at most
    assert found.buckets(1)[-1].loss is None
    assert length_report.table(fake_results(found)).endswith(" 0        -")


def test_a_length_within_the_training_has_no_loss_beyond():
    found = fake(32, 10, [3.0])
    assert found.loss_beyond is None
    assert found.loss_within == found.loss == 3.0


def test_no_more_rows_are_read_than_the_split_has(loaded, corpus, monkeypatch):
    shapes = []
    real = length_generalization.chunks
    monkeypatch.setattr(
        length_generalization, "chunks", lambda batch, *rest: shapes.append(batch.tokens.shape) or real(batch, *rest)
    )
    run(loaded, corpus, context_length=300, batch_tokens=10**6)
    num_records = -(-(corpus.splits["validation"].num_tokens - 1) // 300)
    assert shapes == [(num_records, 300)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_length": 0}, "context length must be 1 or more, got 0"),
        ({"batch_tokens": 0}, "batch_tokens must be 1 or more, got 0"),
        ({"max_batches": 0}, "max_batches must be 1 or more, got 0"),
        ({"chunk_tokens": 0}, "chunk_tokens must be 1 or more, got 0"),
        ({"context_length": 10**7}, "context length 10,000,000 is longer than the validation split of"),
    ],
)
def test_settings_out_of_range_are_refused(loaded, corpus, settings, message):
    with pytest.raises(EvaluationError, match=message):
        run(loaded, corpus, **settings)


def test_caches_that_do_not_fit_are_refused_before_the_work(loaded, corpus, monkeypatch):
    monkeypatch.setattr(length_generalization, "read_chunk", None)
    monkeypatch.setattr(length_generalization, "free_bytes", lambda device: 10)
    with pytest.raises(
        EvaluationError, match=r"batches of 2 sequences takes caches of .* 0.0 GiB free; lower batch_tok"
    ):
        run(loaded, corpus)
    with pytest.raises(EvaluationError, match=r"batches of 1 sequences .*; choose a shorter context"):
        run(loaded, corpus, batch_tokens=1)


def test_a_model_that_is_not_finite_is_refused(corpus):
    damaged = make_loaded(corpus)
    damaged.model.final_norm.scale[...] = damaged.model.final_norm.scale[...] * np.nan
    with pytest.raises(EvaluationError, match="the loss at position 0 or soon after is not finite"):
        run(damaged, corpus)


def fake(trained: int, context: int, losses: list[float], **changes) -> LengthGeneralization:
    """Of one target at each position; losses of the octaves."""
    edges = bucket_edges(trained, context, 4)
    weight = np.diff(edges).astype(np.float64)
    octave = np.searchsorted(bucket_edges(trained, context, 1), edges[:-1], side="right") - 1
    sums = PositionSums(weight * np.array(losses)[octave], weight)
    values = {"positions": "row", "fraction": 1.0, "chunk_tokens": 8, "cache_bytes": (1024, 4096)}
    return LengthGeneralization(trained, context, edges=tuple(edges), sums=sums, **(values | changes))


def fake_results(measured: LengthGeneralization, run: str = "rat") -> dict:
    return json.loads(json.dumps({"run": run, "step": 3, **measured.as_json()}))


def test_tables():
    long, short = (
        fake_results(fake(32, 128, [3.0, 2.5, 2.25, 2.5])),
        fake_results(fake(32, 64, [3.0, 2.5, 4.0]), "rope"),
    )
    assert length_report.table(long).splitlines() == [
        "loss on the whole validation split, in sequences of 128 tokens",
        "trained on 32 tokens; positions are counted from the start of a row",
        "cache of a row: 1.0 KiB at 32 tokens, 4.0 KiB at 128",
        "         positions      x training        tokens     loss",
        "       0 ..      15      0 ..   0.5            16   3.0000",
        "      16 ..      31    0.5 ..     1            16   2.5000",
        "      32 ..      63      1 ..     2            32   2.2500",
        "      64 ..     127      2 ..     4            64   2.5000",
    ]
    assert length_report.markdown_table([long, short]).splitlines() == [
        "| run | below 32 | 32 to 63 | 64 to 127 | KiB of cache at 32 | at the longest |",
        "|---|---|---|---|---|---|",
        "| rat | 2.750 | 2.250 | 2.500 | 1.0 | 4.0 |",
        "| rope | 2.750 | 4.000 |  | 1.0 | 4.0 |",
    ]
    other = fake_results(fake(64, 128, [3.0, 2.5, 2.25, 2.5]))
    with pytest.raises(EvaluationError, match="one training length, these runs have 32, 64"):
        length_report.markdown_table([long, other])


def test_results_are_found_in_a_workdir(tmp_path):
    with pytest.raises(EvaluationError, match=r"has no length_generalization-\*.json: run `python eval.py"):
        length_report.find_results(tmp_path)
    for step, context in ((3, 64), (3, 128), (2, 256)):
        values = fake_results(fake(32, context, [3.0] * 5)) | {"step": step}
        (tmp_path / f"length_generalization-{step}-corpus-{context}-0.json").write_text(json.dumps(values))
    assert length_report.find_results(tmp_path)["context_length"] == 128
    file = tmp_path / "length_generalization-2-corpus-256-0.json"
    assert length_report.find_results(file)["step"] == 2
    (tmp_path / "length_generalization-3-other-128-1.json").write_bytes(
        (tmp_path / "length_generalization-3-corpus-128-0.json").read_bytes()
    )
    with pytest.raises(EvaluationError, match=r"has several of its last step, name one: .*corpus-128-0.*other-128-1"):
        length_report.find_results(tmp_path)
    file.write_text("{}")
    with pytest.raises(EvaluationError, match="holds no loss_by_octave"):
        length_report.find_results(file)
    with pytest.raises(EvaluationError, match="there is neither a workdir nor a file"):
        length_report.find_results(tmp_path / "missing")


SHOWN = ("run", "step", "trained_length", "context_length", "positions", "split_fraction", "cache_bytes", "loss_within")


@pytest.mark.parametrize("name", [*SHOWN, "loss_by_octave", "loss_by_position"])
def test_results_without_a_figure_are_named(tmp_path, name):
    """Whatever the table and the picture show, by itself and in the buckets."""
    file = tmp_path / "length_generalization-3-corpus-128-0.json"
    complete = fake_results(fake(32, 128, [3.0, 2.5, 2.25, 2.5]))

    def refused(values) -> str:
        file.write_text(json.dumps(values))
        with pytest.raises(EvaluationError) as caught:
            length_report.find_results(tmp_path)
        return str(caught.value)

    again = f"; delete it and measure again: python eval.py --workdir={tmp_path} --length_generalization=8"
    without = {key: value for key, value in complete.items() if key != name}
    if name != "loss_by_octave":  # which tells such files from others
        assert refused(without) == f"{file} is damaged: it has no {name}{again}"
    for value in (True, [[1]], {"x": 1}, 10**400):
        assert refused(complete | {name: value}).endswith(again)
    for key in complete[name] if name == "cache_bytes" else ():
        for value in (None, -1, 10**400):
            assert "cache_bytes" in refused(complete | {name: complete[name] | {key: value}})
    if name.startswith("loss_by"):
        for key in complete[name][0]:
            part = {name: [{field: value for field, value in complete[name][0].items() if field != key}]}
            assert refused(complete | part) == f"{file}, {name}, is damaged: it has no {key}{again}"
        assert f"{name} has no such positions" in refused(complete | {name: [complete[name][0] | {"first": 99}]})


@pytest.mark.parametrize("content", [b"", b'{"loss_by_octave": [', b"[1]", b"\xff"])
def test_results_that_are_cut_short_are_named(tmp_path, content):
    file = tmp_path / "length_generalization-3-corpus-128-0.json"
    file.write_bytes(content)
    with pytest.raises(EvaluationError, match=r"0\.json is damaged: .*; delete it and measure again: python eval\.py"):
        length_report.find_results(tmp_path)
    with pytest.raises(
        EvaluationError, match=r"0\.json is damaged: .*; name what eval\.py --length_generalization wrote"
    ):
        length_report.find_results(file)  # which may be anybody's: no word of deleting it


def test_each_measurement_has_its_own_file(loaded, corpus, tmp_path):
    values = [results.lengths_as_json(loaded, corpus, fake(16, length, [3.0] * 2)) for length in (16, 32)]
    assert values[0]["run"] == "run" and values[0]["mixers"] == {"rnn": {"max_timescale": 16}}
    paths = [results.lengths_path(tmp_path, value) for value in values]
    assert paths[0].name.startswith("length_generalization-5-corpus-16-")
    part = results.lengths_path(tmp_path, values[0] | {"split_fraction": 0.5})
    assert len({*paths, part}) == 3
    assert json.loads(json.dumps(values[1])) == values[1]


def test_pictures_hold_every_run(tmp_path):
    runs = [fake_results(fake(32, 128, [3.0, 2.5, 2.25, 2.5])), fake_results(fake(32, 64, [3.0, 2.5, 4.0]), "rope")]
    length_report.plot(runs, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
