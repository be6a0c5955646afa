"""Weights as safetensors: what is written comes back bit for bit, what is damaged or of others is refused by name."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rat_jax.checkpoints import __main__ as command
from rat_jax.checkpoints import weights as weights_module
from rat_jax.checkpoints.arrays import named
from rat_jax.checkpoints.model_workdir import save_model
from rat_jax.checkpoints.store import load_model
from rat_jax.checkpoints.weights import INDEX_FILE, ONE_FILE, Weights, write_weights
from rat_jax.checkpoints.workdir import CheckpointError
from rat_jax.data.chat_template import ChatTemplate, load_chat_template
from rat_jax.data.tokenizer import IdTokenizer, load_tokenizer
from rat_jax.files import FileError
from rat_jax.mixers import MIXERS
from rat_jax.model import LanguageModel
from tests.full_disk import fill_disk
from tests.tiny_run import tiny_config

CONFIG = tiny_config("/data", model__pattern=("rnn",), model__num_kv_heads=1)


def arrays(model):
    return {name: np.asarray(array) for name, array in named(nnx.state(model)).items()}


def assert_equal(arrays, others):
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        assert array.dtype == others[name].dtype == np.float32
        np.testing.assert_array_equal(array.view(np.uint32), others[name].view(np.uint32))


@pytest.fixture(scope="module")
def model():
    return LanguageModel(CONFIG.model, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "folder"
    write_weights(folder, CONFIG, model, 7, IdTokenizer(29, 0))
    return folder


@pytest.fixture(scope="module")
def sharded(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "sharded"
    write_weights(folder, CONFIG, model, 7, shard_bytes=6_000)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(written, tmp_path / "folder")


@pytest.fixture
def shards(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "shards")


def rewrite(file, change_arrays=lambda arrays: None, change_metadata=lambda metadata: None, checksum=True):
    """A file with other contents, and (`checksum`) a checksum that fits them."""
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    arrays = {name: np.array(array) for name, array in load_file(file).items()}
    change_arrays(arrays)
    del metadata["checksum"]
    change_metadata(metadata)
    if checksum:
        sums = weights_module._Checksum(metadata)
        for name in sorted(arrays):
            sums.add(name, arrays[name])
        metadata["checksum"] = sums.hex()
    save_file(arrays, file, metadata)


class TestRoundTrip:
    """Names, shapes, config and every bit."""

    @pytest.mark.parametrize("kind", MIXERS)
    def test_every_mixer(self, kind, tmp_path):
        config = tiny_config("/data", model__pattern=(kind,), model__num_layers=1, model__qk_norm=True)
        model = nnx.eval_shape(lambda: LanguageModel(config.model, rngs=nnx.Rngs(0)))
        graphdef, abstract = nnx.split(model)
        rng = np.random.default_rng(0)
        filled = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), abstract)
        model = nnx.merge(graphdef, filled)
        write_weights(tmp_path / "folder", config, model, 3)
        weights = Weights.open(tmp_path / "folder")
        assert (weights.config, weights.step, weights.dtypes) == (config, 3, ["float32"])
        assert weights.load_tokenizer() is None
        assert_equal(weights.read(), arrays(model))
        assert_equal(arrays(weights.model()), arrays(model))

    def test_bfloat16_is_exact_where_the_values_are_and_else_the_nearest(self, model, tmp_path):
        write_weights(tmp_path / "first", CONFIG, model, 7, dtype="bfloat16")
        weights = Weights.open(tmp_path / "first")
        assert weights.dtypes == ["bfloat16"]
        want = {name: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for name, x in arrays(model).items()}
        assert_equal(weights.read(), want)
        rounded = weights.model()
        write_weights(tmp_path / "second", CONFIG, rounded, 7, dtype="bfloat16")
        assert_equal(Weights.open(tmp_path / "second").read(), want)

    def test_others_can_read_the_files(self, written, sharded, model):
        assert_equal(load_file(written / ONE_FILE), arrays(model))
        index = json.loads((sharded / INDEX_FILE).read_text())
        files = sorted(file.name for file in sharded.glob("*.safetensors"))
        assert len(files) >= 3
        assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        assert sorted(set(index["weight_map"].values())) == files
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays(model).values())
        for file in files:
            held = load_file(sharded / file)
            assert len(held) == 1 or sum(array.nbytes for array in held.values()) <= 6_000
            assert all(index["weight_map"][name] == file for name in held)

    def test_whoever_may_read_new_files_may_read_them(self, written, tmp_path):
        (tmp_path / "file").touch()
        assert (written / ONE_FILE).stat().st_mode == (tmp_path / "file").stat().st_mode

    def test_a_folder_of_the_first_version(self):
        """Written once; its arrays count in eighths."""
        weights = Weights.open(pathlib.Path(__file__).parents[1] / "testdata/weights_v1")
        assert (weights.step, weights.config.model.pattern, weights.dtypes) == (7, ("rnn",), ["bfloat16"])
        for array in weights.read().values():
            want = (np.arange(array.size) / 8).astype(jnp.bfloat16).astype(np.float32).reshape(array.shape)
            np.testing.assert_array_equal(array, want)

    def test_parts(self, sharded, model):
        assert_equal(Weights.open(sharded).read(), arrays(model))
        Weights.open(sharded).verify()

    def test_a_workdir_and_back(self, model, tmp_path, capsys):
        template = ChatTemplate("{{ messages[0].content }}")
        save_model(tmp_path / "run", CONFIG, model, 7, IdTokenizer(29, 0), template)
        for words in (
            ["export", tmp_path / "run", tmp_path / "folder"],
            ["import", tmp_path / "folder", tmp_path / "new"],
            ["list", tmp_path / "new"],
            ["verify", tmp_path / "new"],
            ["list", tmp_path / "folder"],
            ["verify", tmp_path / "folder"],
        ):
            assert command.main([str(word) for word in words]) == 0
        loaded = load_model(tmp_path / "new")
        assert (loaded.config, loaded.step) == (load_model(tmp_path / "run").config, 7)
        assert_equal(arrays(loaded.model), arrays(model))
        assert load_tokenizer(tmp_path / "new/tokenizer").hash == IdTokenizer(29, 0).hash
        assert load_chat_template(tmp_path / "new/tokenizer") == template
        said = capsys.readouterr().out.splitlines()[-4:]
        for line, name, holds, state in zip(
            said,
            ("0", "0", "folder", "folder"),
            ("model of step 7", "model of step 7", "model of step 7 in float32", "model of step 7 in float32"),
            ("complete", "good", "complete", "good"),
            strict=True,
        ):
            assert line.split()[0] == name and line.endswith(f"  {holds}  {state}")


def flip_bit(folder):
    content = bytearray((folder / ONE_FILE).read_bytes())
    content[-3] ^= 1
    (folder / ONE_FILE).write_bytes(content)


def cut_short(folder):
    (folder / ONE_FILE).write_bytes((folder / ONE_FILE).read_bytes()[:-4])


def change_config(folder):
    """So that the arrays still fit."""
    file = folder / ONE_FILE
    file.write_bytes(file.read_bytes().replace(rb"\"weight_decay\": 0.1", rb"\"weight_decay\": 0.2"))


def swap_arrays(folder):
    rewrite(
        folder / ONE_FILE,
        lambda arrays: arrays.update({"embedding": arrays["embedding"][::-1].copy()}),
        lambda metadata: metadata.update(checksum="0" * 64),
        checksum=False,
    )


class TestDamage:
    """Each is one line, and nothing is made of it."""

    @pytest.mark.parametrize("damage", [flip_bit, change_config, swap_arrays])
    def test_contents(self, folder, tmp_path, capsys, damage):
        before = (folder / ONE_FILE).read_bytes()
        damage(folder)
        assert (folder / ONE_FILE).read_bytes() != before
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged: its content has changed since"):
            Weights.open(folder).read()
        assert command.main(["list", str(folder)]) == 0  # which looks at headers alone
        for words in (["verify", folder], ["import", folder, tmp_path / "run"]):
            capsys.readouterr()
            assert command.main(list(map(str, words))) == 2
            error = capsys.readouterr().err
            assert error.startswith("error: ") and error.count("\n") == 1
        assert not (tmp_path / "run").exists()

    def test_a_tokenizer_of_another_model(self, folder, tmp_path, capsys):
        """Whatever is made of it no program could use."""
        IdTokenizer(31, 0).save(folder / "tokenizer")
        message = "has a vocabulary of 31, the model of 29: it belongs to another model"
        assert command.main(["import", str(folder), str(tmp_path / "new")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "new").exists()
        assert command.main(["verify", str(folder)]) == 2
        assert message in capsys.readouterr().out
        for file in (folder / "tokenizer").iterdir():
            file.write_text("{")
        assert command.main(["verify", str(folder)]) == 2
        assert "tokenizer_info.json is damaged" in capsys.readouterr().out

    @pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100, b"\x08" + bytes(7) + b"{}      ", None])
    def test_other_files(self, folder, content):
        if content is None:
            cut_short(folder)
        else:
            (folder / ONE_FILE).write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors (is damaged, or not|was not written here)"):
            Weights.open(folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda arrays: arrays.pop("embedding"), r"embedding: None there, \[\[29, 16\], 'float32'\] here"),
            (lambda arrays: arrays.update(more=np.ones(2, np.float32)), r"more: \[\[2\], 'float32'\] there, None here"),
            (lambda a: a.update(embedding=a["embedding"][:, :8].copy()), r"embedding: \[\[29, 8\], 'float32'\] there"),
            (lambda a: a.update(embedding=a["embedding"].astype(np.float16)), "embedding is F16, not F32 or BF16"),
        ],
    )
    def test_other_arrays(self, folder, change, message):
        rewrite(folder / ONE_FILE, change)
        with pytest.raises(CheckpointError, match=message):
            Weights.open(folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda metadata: metadata.clear(), "was not written here: its header has no rat_jax_format_version"),
            (lambda metadata: metadata.update(rat_jax_format_version="2"), "has format version 2; this code reads 1"),
            (lambda metadata: metadata.pop("config"), "the header is damaged: config is missing"),
            (lambda metadata: metadata.update(more="1"), "the header is damaged: more is no field of it"),
            (lambda metadata: metadata.update(step="-1"), "step in its header must be a whole number, got '-1'"),
            (lambda metadata: metadata.update(config="{"), "the config in its header cannot be used: Expecting"),
            (lambda metadata: metadata.update(config="{}"), "cannot be used: config.model is missing"),
        ],
    )
    def test_other_headers(self, folder, change, message):
        rewrite(folder / ONE_FILE, change_metadata=change)
        with pytest.raises(CheckpointError, match=message) as caught:
            Weights.open(folder)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("index", "message"),
        [
            ("{", "is damaged"),
            ("{}", "has no weight_map"),
            ('{"weight_map": {"embedding": "../model.safetensors"}}', "is not the name of a file beside it"),
            ('{"weight_map": {"embedding": "other.safetensors"}}', r"there is no file .*other\.safetensors"),
        ],
    )
    def test_other_indices(self, shards, index, message):
        (shards / INDEX_FILE).write_text(index)
        with pytest.raises(CheckpointError, match=message):
            Weights.open(shards)

    def test_parts_that_do_not_fit_together(self, shards, folder):
        first = shards / sorted(file.name for file in shards.glob("*.safetensors"))[0]
        content = first.read_bytes()
        rewrite(first, change_metadata=lambda metadata: metadata.update(step="8"))
        with pytest.raises(CheckpointError, match="is of another model or step than"):
            Weights.open(shards)
        first.write_bytes(content)
        rewrite(first, lambda arrays: arrays.update(more=np.ones(2, np.float32)))
        with pytest.raises(CheckpointError, match=r"holds other arrays than .*index\.json says"):
            Weights.open(shards)
        first.unlink()
        with pytest.raises(CheckpointError, match=f"there is no file {first}"):
            Weights.open(shards)
        shutil.copy(folder / ONE_FILE, shards)
        with pytest.raises(CheckpointError, match="it holds both"):
            Weights.open(shards)

    def test_no_folder(self, folder, tmp_path):
        for path, message in (
            (tmp_path / "none", "there is no folder"),
            (folder / ONE_FILE, "is no folder"),
            (tmp_path, "it holds neither"),
        ):
            with pytest.raises(CheckpointError, match=message):
                Weights.open(path)


class TestCommands:
    """Nothing is written over, what is found is said."""

    def test_export_never_writes_over_anything(self, model, tmp_path, folder, capsys):
        save_model(tmp_path / "run", CONFIG, model, 7)
        before = (folder / ONE_FILE).read_bytes()
        (tmp_path / "file").write_text("mine")
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        for name in ("folder", "file", "link"):
            assert command.main(["export", str(tmp_path / "run"), str(tmp_path / name)]) == 2
            assert f"{tmp_path / name} is there already and not empty" in capsys.readouterr().err
        assert (folder / ONE_FILE).read_bytes() == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link", "run"]

    def test_an_export_that_cannot_be_written_leaves_nothing(self, model, tmp_path, monkeypatch, capsys):
        save_model(tmp_path / "run", CONFIG, model, 7)

        def fail(arrays, path, metadata):
            path.write_bytes(b"half")
            raise weights_module.SafetensorError("I/O error: No space left on device (os error 28)")

        monkeypatch.setattr(weights_module, "save_file", fail)
        assert command.main(["export", str(tmp_path / "run"), str(tmp_path / "folder")]) == 1
        error = capsys.readouterr().err
        assert "folder/model.safetensors cannot be written: No space left on device; make room on its disk" in error
        assert [path.name for path in tmp_path.iterdir()] == ["run"]

    def test_import_wants_a_new_workdir(self, model, folder, tmp_path, capsys):
        save_model(tmp_path / "run", CONFIG, model, 7)
        assert command.main(["import", str(folder), str(tmp_path / "run")]) == 2
        assert "is there already and not empty; it is left as it is" in capsys.readouterr().err

    @pytest.mark.parametrize(("name", "code"), [("run.json", 2), ("manifest.json", 1)])
    def test_an_import_onto_a_full_disk(self, folder, tmp_path, monkeypatch, capsys, name, code):
        words = ["import", str(folder), str(tmp_path / "run")]
        with monkeypatch.context() as patch:
            fill_disk(patch, name)
            assert command.main(words) == code
        error = capsys.readouterr().err
        assert "No space left on device; make room on its disk" in error
        assert ("; no model was saved yet, and the same command starts again\n" in error) == (code == 1)
        assert (tmp_path / "run").exists() == (code == 1)
        assert command.main(words) == 0

    def test_damaged_checkpoints_are_found(self, model, tmp_path, capsys):
        save_model(tmp_path / "run", CONFIG, model, 7)
        shutil.copytree(tmp_path / "run/checkpoints/0", tmp_path / "run/checkpoints/unfinished-3")
        assert command.main(["verify", str(tmp_path / "run")]) == 0
        assert "unfinished-3" in capsys.readouterr().out
        files = [file for file in (tmp_path / "run/checkpoints/0/params").rglob("*") if file.is_file()]
        largest = max(files, key=lambda file: file.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
        assert command.main(["list", str(tmp_path / "run")]) == 0
        assert capsys.readouterr().out.splitlines()[0].endswith("complete")
        assert command.main(["verify", str(tmp_path / "run")]) == 2
        said = capsys.readouterr()
        assert "is damaged: the content of" in said.out.splitlines()[0]
        assert said.err == f"error: {tmp_path / 'run'}: 0 cannot be used\n"
        largest.write_bytes(content[:-1])
        command.main(["list", str(tmp_path / "run")])
        assert f"has {len(content) - 1} bytes, not {len(content)}" in capsys.readouterr().out

    def test_what_is_no_workdir(self, tmp_path, capsys):
        for words in (["list", "none"], ["verify", "none"], ["export", "none", "folder"], ["import", "none", "run"]):
            assert command.main([words[0], *(str(tmp_path / word) for word in words[1:])]) == 2
            assert capsys.readouterr().err.startswith("error: there is no ")


def test_the_system_s_refusals_are_named(folder, tmp_path):
    shutil.rmtree(folder)
    (folder / ONE_FILE).mkdir(parents=True)
    with pytest.raises(FileError, match=r"model\.safetensors cannot be read: "):
        Weights.open(folder)
