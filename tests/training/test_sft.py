"""Fine-tuning: runs on rows of examples start from a model, resume to the last bit, and refuse what does not fit."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from rat_jax.checkpoints.model_workdir import save_model
from rat_jax.checkpoints.store import load_model
from rat_jax.checkpoints.workdir import CheckpointError, Workdir
from rat_jax.config import MeshConfig
from rat_jax.data import DataError
from rat_jax.data.chat_template import load_chat_template
from rat_jax.data.corpus import Corpus
from rat_jax.data.pipeline import TrainData
from rat_jax.data.tokenizer import ByteTokenizer, IdTokenizer
from rat_jax.evaluation import EvaluationError, perplexity
from rat_jax.model import LanguageModel
from rat_jax.sharding import make_mesh
from rat_jax.training import run as training
from tests.cluster.job import codes_of, job, said
from tests.data.test_chat_template import INSTRUCTIONS, chat
from tests.tiny_run import tiny_config
from tests.tiny_sft import make_examples, number_records

SEQ_LEN = 24
FORM = {"tokenizer": "ids:29:0", "seq_len": SEQ_LEN}


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def tuning_config(corpus, origin, **changes):
    """A RAttention model with grouped heads, that starts from a workdir."""
    values = {
        "model__pattern": ("rattention",),
        "model__num_layers": 1,
        "model__num_kv_heads": 1,
        "data__seq_len": SEQ_LEN,
        "data__global_batch_size": 4,
        "init__path": str(origin),
        "training__num_steps": 4,
        "training__validate_every_steps": 4,
    }
    return tiny_config(corpus.path, **{**values, **changes})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    records = number_records(24, 12, 4, seed=0)
    return make_examples(folder, records[:16], records[16:], **FORM)


@pytest.fixture(scope="module")
def origin(corpus, tmp_path_factory):
    """A workdir of a model alone."""
    config = tuning_config(corpus, "nothing")
    path = tmp_path_factory.mktemp("pretrained") / "run"
    save_model(path, config, LanguageModel(config.model, rngs=nnx.Rngs(1)), step=5, tokenizer=IdTokenizer(29, 0))
    return path


@pytest.fixture(scope="module")
def tuned(corpus, origin, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tuned") / "run"
    assert training.train(tuning_config(corpus, origin), workdir).finished
    return workdir


def leaves(path):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(load_model(path).model))]


def log(workdir):
    return [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]


def test_it_starts_from_a_workdir_and_changes_it(tuned, origin):
    assert json.loads((tuned / "run.json").read_text())["origin"]["step"] == 5
    before, after = leaves(origin), leaves(tuned)
    assert all(np.isfinite(leaf).all() for leaf in after)
    assert any((one != other).any() for one, other in zip(before, after, strict=True))


def test_answers_alone_count(tuned, corpus):
    """The steps of an epoch have as many targets as there are ids of answers."""
    figures = corpus.examples.splits["train"]
    assert figures.num_rows == 4 * corpus.examples.num_steps(4), "an epoch is whole batches"
    steps = [record["num_targets"] for record in log(tuned) if "num_targets" in record]
    assert sum(steps[: corpus.examples.num_steps(4)]) == figures.num_answer_tokens < figures.num_tokens / 2


def test_it_resumes_to_the_last_bit(tuned, corpus, origin, tmp_path, monkeypatch):
    original, batches = TrainData.__next__, iter(range(3))

    def read(data):
        if next(batches, None) is None:
            raise Killed
        return original(data)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TrainData, "__next__", read)
        training.train(tuning_config(corpus, origin), tmp_path / "run")
    assert training.train(tuning_config(corpus, origin), tmp_path / "run").finished
    for one, other in zip(leaves(tuned), leaves(tmp_path / "run"), strict=True):
        np.testing.assert_array_equal(one, other)
    last = [
        [record["validation_loss"] for record in log(run) if "validation_loss" in record][-1:]
        for run in (tuned, tmp_path / "run")
    ]
    assert last[0] == last[1] != []


def test_the_loss_of_the_validation_answers_can_be_evaluated(tuned, corpus, tmp_path):
    mesh = make_mesh(MeshConfig(data=1, fsdp=1))
    loaded = load_model(tuned, mesh=mesh)
    found = perplexity.evaluate(loaded, corpus, mesh, SEQ_LEN, batch_tokens=4 * SEQ_LEN, max_batches=None)
    assert found.num_targets == corpus.examples.splits["validation"].num_answer_tokens
    assert found.bits_per_byte is None
    one_row = make_examples(tmp_path, number_records(4, 9, 3, 0), number_records(1, 9, 3, 1), **FORM)
    perplexity.check_fits(loaded, one_row, mesh, SEQ_LEN, batch_tokens=SEQ_LEN)
    with pytest.raises(EvaluationError, match=f"rows of {SEQ_LEN} tokens, and cannot be read in sequences of 16"):
        perplexity.evaluate(loaded, corpus, mesh, 16, batch_tokens=64, max_batches=None)


def test_more_steps_are_a_new_run_from_this_one(tuned, corpus, origin):
    with pytest.raises(CheckpointError, match=f"start a new run from it: .*--config.init.path={tuned} "):
        training.train(tuning_config(corpus, origin, training__num_steps=9), tuned)
    with pytest.raises(CheckpointError, match="start a new run from it"):  # of the same parameters
        training.train(tuning_config(corpus, origin, training__num_steps=9, model__remat="block"), tuned)
    with pytest.raises(CheckpointError, match="was trained with another config") as refused:  # nor is it of this model
        training.train(tuning_config(corpus, origin, training__num_steps=9, model__mlp_width=48), tuned)
    assert "start a new run" not in str(refused.value)


def test_examples_of_another_tokenizer_are_refused(corpus, tmp_path):
    config = tuning_config(corpus, tmp_path / "run")
    model = LanguageModel(config.model, rngs=nnx.Rngs(0))
    save_model(tmp_path / "run", config, model, step=5, tokenizer=IdTokenizer(29, 1))
    with pytest.raises(DataError, match=r"made by another tokenizer than the model's, which is in .*run/tokenizer"):
        training.train(config, tmp_path / "new")
    assert not (tmp_path / "new" / "run.json").exists()


def test_the_chat_template_goes_into_the_workdir(tmp_path):
    (tmp_path / "chat.jinja").write_text(INSTRUCTIONS)
    records = [{"messages": chat("a", "b")}]
    chats = make_examples(tmp_path, records, records, rows="padded", chat_template=str(tmp_path / "chat.jinja"))
    workdir = Workdir(tmp_path / "run")
    workdir.path.mkdir()
    workdir.save_tokenizer(ByteTokenizer())
    assert load_chat_template(workdir.tokenizer) is None
    for _ in range(2):
        workdir.save_tokenizer(ByteTokenizer(), Corpus.open(chats.path).chat_template())
        assert load_chat_template(workdir.tokenizer).source == INSTRUCTIONS


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["packed", "padded"])
@pytest.mark.parametrize("mesh", [{"context": 2, "tensor": 2}, {"data": 2, "context": 2}, {"fsdp": 4}])
def test_two_processes_whose_mesh_cuts_rows_tune_as_one_device(tmp_path, rows, mesh):
    """Masks of answers and documents go with the tokens: every loss is that of one device."""
    records = number_records(40, 10, 5, seed=3)
    corpus = make_examples(tmp_path, records[:30], records[30:], tokenizer="ids:30:0", seq_len=SEQ_LEN, rows=rows)
    changes = {
        "model__vocab_size": 30,
        "model__pattern": ("rat", "rattention", "local_attention"),
        "model__num_layers": 3,
        "model__num_heads": 4,
        "model__num_kv_heads": None,
        "data__segment_documents": rows == "packed",
        "init__path": str(tmp_path / "origin"),
    }
    config = tuning_config(corpus, "nothing", **changes)
    model = LanguageModel(config.model, rngs=nnx.Rngs(1))
    save_model(tmp_path / "origin", config, model, step=5, tokenizer=IdTokenizer(30, 0))
    assert training.train(config, tmp_path / "alone").finished
    sizes = {"mesh__data": 1, "mesh__fsdp": 1} | {f"mesh__{axis}": size for axis, size in mesh.items()}
    with job(tmp_path, tuning_config(corpus, "nothing", **changes, **sizes)) as processes:
        assert codes_of(processes) == [0, 0], [said(tmp_path, number)[-3000:] for number in range(2)]
    names = ("loss", "validation_loss", "grad_norm")
    found, wanted = (
        {(line["step"], name): line[name] for line in log(tmp_path / run) for name in names if name in line}
        for run in ("run", "alone")
    )
    assert found.keys() == wanted.keys() and len(wanted) >= 5
    assert max(abs(found[key] - wanted[key]) for key in wanted) < 2e-5
