"""Checkpoints: what was saved comes back, what was damaged is noticed."""

import dataclasses
import errno
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rat_jax.checkpoints import folder as folder_module
from rat_jax.checkpoints import manifest as manifest_module
from rat_jax.checkpoints import store as checkpoint
from rat_jax.checkpoints.model_workdir import save_model
from rat_jax.checkpoints.owner import owned
from rat_jax.checkpoints.store import Checkpoints, Manifest, abstract_model, load_model
from rat_jax.checkpoints.workdir import CheckpointError, Workdir
from rat_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from rat_jax.errors import RunStopped
from rat_jax.files import FileError
from tests.checkpoints.saved_run import (
    CONFIG,
    DAMAGES,
    assert_is_multiple,
    files_up_to,
    forget_saves,
    kill,
    largest_file,
    new_run,
    remove_manifest,
    save,
    steps,
    times,
    tree,
)
from tests.tiny_run import tiny_config


class TestCheckpoints:
    """Saving and going on."""

    def test_saves_what_was_there_although_the_arrays_are_donated(self, tmp_path):
        checkpoints = Checkpoints(new_run(tmp_path), CONFIG, lambda message: None)
        params = {"embedding": jnp.arange(1 << 20, dtype=jnp.float32)}
        expected = np.array(params["embedding"])
        step = jax.jit(lambda params: jax.tree.map(lambda x: x + 1, params), donate_argnums=0)
        save(checkpoints, 1, params)
        for _ in range(20):
            params = step(params)
        checkpoints.close()
        path, manifest = Checkpoints(Workdir(tmp_path), CONFIG, print).latest()
        target = jax.eval_shape(lambda: {"embedding": jnp.zeros((1 << 20,), jnp.float32)})
        target = checkpoint._placed(target, None)
        np.testing.assert_array_equal(checkpoints.restore(path, manifest, "params", target)["embedding"], expected)

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_latest_sets_damaged_ones_aside_so_that_their_step_can_be_saved(self, run, model, damage):
        damage(run)
        said = []
        checkpoints = Checkpoints(Workdir(run), CONFIG, said.append)
        path, manifest = checkpoints.latest()
        assert (path.name, manifest.step, manifest.data) == ("20", 20, {"next_batch": 20, "fingerprint": {"seed": 0}})
        assert "checkpoints/30" in said[0]
        save(checkpoints, 30, times(model, 3))
        checkpoints.close()
        assert_is_multiple(load_model(run).model, model, 3)

    def test_unfinished_saves_are_removed(self, run):
        for name in ("40.orbax-checkpoint-tmp-1", "removing-10"):
            (run / "checkpoints" / name).mkdir()
        assert Checkpoints(Workdir(run), CONFIG, print).latest()[1].step == 30
        assert steps(run) == ["10", "20", "30"]

    def test_what_has_no_manifest_is_set_aside_again_and_again(self, run, model):
        for aside in (["unfinished-30"], ["unfinished-30", "unfinished-30-2"]):
            before = tree(run / "checkpoints/30")
            remove_manifest(run)
            checkpoints = Checkpoints(Workdir(run), CONFIG, lambda message: None)
            assert checkpoints.latest()[1].step == 20
            assert steps(run) == ["10", "20", *aside]
            assert {*before} - {*tree(run / "checkpoints" / aside[-1])} == {"manifest.json"}
            save(checkpoints, 30, times(model, 3))
            checkpoints.close()

    def test_what_no_run_writes_is_named_once_and_left(self, run, model):
        (run / "checkpoints/notes.txt").write_text("mine")
        (run / "checkpoints/best").mkdir()
        (run / "checkpoints/030").mkdir()
        (run / "checkpoints/9").write_text("mine")
        before = tree(run)
        said = []
        checkpoints = Checkpoints(Workdir(run), CONFIG, said.append)
        assert checkpoints.latest()[1].step == 30
        (line,) = said
        assert "checkpoints holds 030, 9, best, notes.txt, which no run writes; left as it is" in line
        assert tree(run) == before
        save(checkpoints, 40, times(model, 4))
        save(checkpoints, 50, times(model, 5))
        checkpoints.close()
        assert steps(run) == ["030", "30", "40", "50", "9", "best", "notes.txt"]

    def test_a_file_in_the_place_of_a_later_checkpoint_is_refused_at_the_start(self, run):
        (run / "checkpoints/50").write_text("mine")
        with pytest.raises(CheckpointError, match="checkpoints/50 is no checkpoint but has the name of one: move it"):
            Checkpoints(Workdir(run), CONFIG, lambda message: None).latest()

    def test_a_checkpoint_in_the_folder_of_another_step_is_not_taken(self, run):
        shutil.copytree(run / "checkpoints/10", run / "checkpoints/40")
        said = []
        assert load_model(run, report=said.append).step == 30
        assert "its folder should be called 10; trying the one before" in said[0]
        assert Checkpoints(Workdir(run), CONFIG, said.append).latest()[1].step == 30
        assert "damaged-40" in steps(run)

    def test_a_checkpoint_of_newer_code_is_left(self, run):
        manifest = run / "checkpoints/30/manifest.json"
        manifest.write_text(manifest.read_text().replace('"format_version": 4', '"format_version": 5'))
        before = tree(run)
        for read in (Checkpoints.peek, Checkpoints.latest):
            with pytest.raises(CheckpointError, match="format version 5; this code reads 1, 2, 3, 4"):
                read(Checkpoints(Workdir(run), CONFIG, print))
        assert tree(run) == before

    def test_files_that_the_manifest_does_not_list(self, run):
        (run / "checkpoints/30/params/.nfs0001").write_text("of the file system")
        assert load_model(run).step == 30
        (run / "checkpoints/30/params/d/other").write_text("")
        with pytest.raises(CheckpointError, match=r"its manifest\.json does not list params/d/other"):
            load_model(run, step=30)

    def test_what_the_system_does_not_let_it_read_is_not_set_aside(self, run, monkeypatch):
        before = tree(run)

        def refuse(file):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(manifest_module, "sha256", refuse)
        for read in (lambda: load_model(run), Checkpoints(Workdir(run), CONFIG, print).latest):
            with pytest.raises(FileError, match=r"checkpoints/30/.* cannot be read: Permission denied; change its"):
                read()
        assert tree(run) == before

    def test_refuses_to_start_anew_where_all_are_damaged(self, run):
        for step in (10, 20, 30):
            largest_file(run, step).unlink()
        for _ in range(2):
            with pytest.raises(
                CheckpointError, match=r"no good checkpoint is left.*damaged-10, damaged-20, damaged-30"
            ):
                Checkpoints(Workdir(run), CONFIG, lambda message: None).latest()

    @pytest.mark.parametrize("notes", [True, False])
    def test_refuses_to_start_anew_where_no_manifest_is_left(self, run, notes):
        if not notes:
            forget_saves(run)
        for step in (10, 20, 30):
            (run / f"checkpoints/{step}/manifest.json").unlink()
        content = sorted(map(len, tree(run / "checkpoints").values()))
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"no good checkpoint is left.*unfinished-10.*choose another"):
                Checkpoints(Workdir(run), CONFIG, lambda message: None).latest()
        assert sorted(map(len, tree(run / "checkpoints").values())) == content

    def test_refuses_to_start_anew_where_the_folder_is_gone(self, run):
        shutil.rmtree(run / "checkpoints")
        message = f"no good checkpoint is left in .*, though step 30 was.*Put a copy.*or, to start.*move {run} away"
        with pytest.raises(CheckpointError, match=message):
            Checkpoints(Workdir(run), CONFIG, lambda message: None).latest()
        # Code that did not note what was saved: the log shows it, from twice as many steps on as lie between saves.
        forget_saves(run)
        every = CONFIG.training.checkpoint_every_steps
        log = run / "log.jsonl"
        log.write_text("".join(f'{{"step": {step}}}\n' for step in range(2 * every + 1)))
        assert Checkpoints(Workdir(run), CONFIG, print).latest() is None
        log.write_text(log.read_text() + f'{{"step": {2 * every + 1}}}\n')
        with pytest.raises(CheckpointError, match="though some were saved"):
            Checkpoints(Workdir(run), CONFIG, print).latest()

    def test_a_kill_within_the_first_save_loses_nothing(self, model, tmp_path, monkeypatch):
        checkpoints = Checkpoints(new_run(tmp_path), CONFIG, print)
        monkeypatch.setattr(Manifest, "write", kill)
        save(checkpoints, 10, times(model, 1))
        with pytest.raises(KeyboardInterrupt):
            checkpoints.close()
        monkeypatch.undo()
        checkpoints = Checkpoints(Workdir(tmp_path), CONFIG, print)
        assert checkpoints.latest() is None
        assert steps(tmp_path) == ["unfinished-10"]
        save(checkpoints, 10, times(model, 1))
        checkpoints.close()
        assert Checkpoints(Workdir(tmp_path), CONFIG, print).latest()[1].step == 10

    def test_keeps_the_newest(self, run, model):
        said = []
        checkpoints = Checkpoints(Workdir(run), CONFIG, said.append)
        save(checkpoints, 40, times(model, 4))
        checkpoints.close()
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["20", "30", "40"]
        assert said == [f"saved {run / 'checkpoints/40'}"]

    def test_only_complete_checkpoints_of_a_run_make_way_for_new_ones(self, run, model):
        save_model(run.parent / "model", CONFIG, model, 7)
        shutil.copytree(run.parent / "model/checkpoints/0", run / "checkpoints/0")
        (run / "checkpoints/10/manifest.json").unlink()
        few = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, checkpoints_to_keep=2))
        checkpoints = Checkpoints(Workdir(run), few, print)
        save(checkpoints, 40, times(model, 4))
        checkpoints.close()
        assert steps(run) == ["0", "10", "30", "40"]

    def test_an_old_one_that_cannot_be_removed_is_reported(self, run, model, monkeypatch):
        said = []
        checkpoints = Checkpoints(Workdir(run), CONFIG, said.append)

        def refuse(path):
            raise OSError(errno.EBUSY, "Device or resource busy")

        monkeypatch.setattr(folder_module.shutil, "rmtree", refuse)
        save(checkpoints, 40, times(model, 4))
        checkpoints.close()
        assert said[1:] == [f"{run / 'checkpoints/10'} could not be removed: Device or resource busy"]
        assert load_model(run).step == 40

    def test_a_save_before_a_later_one_is_an_error(self, run, model):
        checkpoints = Checkpoints(Workdir(run), CONFIG, lambda message: None)
        with pytest.raises(CheckpointError, match=r"was not saved: .*/30 is there already"):
            save(checkpoints, 25, times(model, 1))
        checkpoints.close()

    def test_a_write_that_fails_in_the_background_is_an_error(self, run, model, monkeypatch):
        checkpoints = Checkpoints(Workdir(run), CONFIG, lambda message: None)

        def fail(self, path):
            raise OSError("No space left on device")

        monkeypatch.setattr(Manifest, "write", fail)
        save(checkpoints, 40, times(model, 1))
        with pytest.raises(CheckpointError, match="No space left on device"):
            checkpoints.close()
        monkeypatch.undo()
        assert load_model(run, report=lambda message: None).step == 30

    def test_a_full_disk_is_one_line_and_leaves_the_last_good_one(self, run, model, capfd):
        checkpoints = Checkpoints(Workdir(run), CONFIG, lambda message: None)
        with files_up_to(2000):
            save(checkpoints, 40, times(model, 1))
            with pytest.raises(
                CheckpointError, match=r"checkpoints/40 could not be written: File too large; raise"
            ) as e:
                checkpoints.close()
        assert "\n" not in str(e.value)
        assert capfd.readouterr().err == ""
        assert load_model(run, report=lambda message: None).step == 30
        assert Workdir(run).record().saved_step == 30
        checkpoints = Checkpoints(Workdir(run), CONFIG, lambda message: None)
        checkpoints.latest()
        save(checkpoints, 40, times(model, 4))
        checkpoints.close()
        assert_is_multiple(load_model(run).model, model, 4)

    def test_a_workdir_that_vanished_is_not_made_again(self, run, model):
        checkpoints = Checkpoints(Workdir(run), CONFIG, lambda message: None)
        shutil.rmtree(run)
        with pytest.raises(CheckpointError, match="checkpoints/40 could not be written: No such file or directory"):
            save(checkpoints, 40, times(model, 1))
        checkpoints.close()
        assert not run.exists()

    def test_nothing_is_written_once_another_process_has_the_workdir(self, run, model):
        with owned(run) as owner:
            checkpoints = Checkpoints(Workdir(run), CONFIG, lambda message: None, owner)
            (run / "owner.json").unlink()
            before = tree(run)
            with pytest.raises(CheckpointError, match="no longer owns the folder"):
                save(checkpoints, 40, times(model, 1))
            checkpoints.close()
            assert tree(run) == before

    def test_a_save_is_not_completed_once_another_process_has_the_workdir(self, run, model, monkeypatch):
        wait, before = checkpoint.ArrayWriter.wait, (run / "run.json").read_bytes()

        def lose(self, path):
            wait(self, path)
            (run / "owner.json").unlink()

        monkeypatch.setattr(checkpoint.ArrayWriter, "wait", lose)
        with owned(run) as owner:
            checkpoints = Checkpoints(Workdir(run), CONFIG, pytest.fail, owner)
            save(checkpoints, 40, times(model, 1))
            with pytest.raises(CheckpointError, match="no longer owns the folder"):
                checkpoints.close()
        assert not (run / "checkpoints/40/manifest.json").exists()
        assert (run / "run.json").read_bytes() == before
        assert steps(run) == ["10", "20", "30", "40"]

    def test_a_save_is_complete_even_if_it_cannot_be_noted(self, run, model, monkeypatch):
        def fail(self, step):
            raise FileError("run.json cannot be written: No space left on device")

        monkeypatch.setattr(Workdir, "note_saved", fail)
        checkpoints = Checkpoints(Workdir(run), CONFIG, lambda message: None)
        save(checkpoints, 40, times(model, 4))
        with pytest.raises(FileError, match=r"run\.json cannot be written"):
            checkpoints.close()
        assert checkpoints.saved_step == load_model(run).step == 40

    @pytest.mark.parametrize(
        "target",
        [
            {"count": jax.ShapeDtypeStruct((), jnp.float32)},
            {"count": jax.ShapeDtypeStruct((1,), jnp.int32)},
            {"number": jax.ShapeDtypeStruct((), jnp.int32)},
        ],
        ids=["dtype", "shape", "name"],
    )
    def test_other_arrays_are_refused(self, saved, target):
        checkpoints = Checkpoints(Workdir(saved), CONFIG, print)
        path, manifest = checkpoints.latest()
        with pytest.raises(CheckpointError, match="holds other arrays"):
            checkpoints.restore(path, manifest, "optimizer", target)

    def test_arrays_have_names_without_indices(self, saved):
        names = Manifest.read(saved / "checkpoints/30").arrays["params"]
        assert names["blocks.00_rnn.mixer.in_proj.kernel"] == [[2, 16, 48], "float32"]
        versions = json.loads((saved / "checkpoints/30/manifest.json").read_text())["versions"]
        assert versions["jax"] == jax.__version__
        assert versions["devices"] == f"{jax.device_count()} x {jax.devices()[0].device_kind}"


class TestSaveModel:
    """Workdirs that hold a model only."""

    def test_round_trip(self, model, tmp_path):
        save_model(tmp_path / "run", CONFIG, model, 1234, ByteTokenizer())
        loaded = load_model(tmp_path / "run")
        assert (loaded.step, loaded.config.data.path) == (1234, os.path.abspath("data"))
        assert_is_multiple(loaded.model, model, 1)
        assert load_tokenizer(tmp_path / "run/tokenizer").hash == ByteTokenizer().hash

    def test_the_same_command_after_a_kill_or_a_full_disk(self, model, tmp_path, monkeypatch):
        folder = tmp_path / "run"
        for owner, name in ((Workdir, "_write"), (Workdir, "save_tokenizer"), (Manifest, "write"), (os, "replace")):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(owner, name, kill)
                save_model(folder, CONFIG, model, 1234, ByteTokenizer())
        message = "could not be written: File too large.*; no model was saved yet, and the same command starts again$"
        with files_up_to(4000), pytest.raises(RunStopped, match=message):  # run.json has room, the arrays have none
            save_model(folder, CONFIG, model, 1234, ByteTokenizer())
        save_model(folder, CONFIG, model, 1234, ByteTokenizer())
        assert load_model(folder).step == 1234
        with pytest.raises(CheckpointError, match="is there already and not empty"):
            save_model(folder, CONFIG, model, 1234, ByteTokenizer())

    def test_an_owner_keeps_others_out(self, model, tmp_path):
        with owned(tmp_path / "run"), pytest.raises(CheckpointError, match="is in use by process"):
            save_model(tmp_path / "run", CONFIG, model, 0)
        assert not (tmp_path / "run").exists()

    def test_a_model_that_is_gone_is_not_replaced_by_a_new_one(self, model, tmp_path):
        save_model(tmp_path / "run", CONFIG, model, 1234)
        shutil.rmtree(tmp_path / "run/checkpoints")
        with pytest.raises(CheckpointError, match=r"no good checkpoint is left in .*, though a model was saved"):
            Checkpoints(Workdir(tmp_path / "run"), CONFIG, print).latest()

    def test_refuses_a_folder_that_is_not_empty_and_another_model(self, model, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(CheckpointError, match="not empty"):
            save_model(tmp_path, CONFIG, model, 0)
        with pytest.raises(CheckpointError, match=r"config\.model"):
            save_model(tmp_path / "run", tiny_config("data"), model, 0)
        assert not (tmp_path / "run").exists()


def test_abstract_model_has_the_shapes_of_the_model(model):
    abstract = jax.tree.map(lambda x: (x.shape, x.dtype), abstract_model(CONFIG.model)[1])
    assert abstract == jax.tree.map(lambda x: (x.shape, x.dtype), nnx.state(model))
