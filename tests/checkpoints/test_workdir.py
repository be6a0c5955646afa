"""The folder of a run: what counts as new, what run.json says, paths and tokenizers."""

import json
import os
import re

import pytest

from rat_jax.checkpoints.workdir import CheckpointError, Workdir, check_same_run
from rat_jax.data.tokenizer import ByteTokenizer, IdTokenizer, load_tokenizer
from rat_jax.files import FileError
from tests.tiny_run import tiny_config

CONFIG = tiny_config("data")


@pytest.fixture
def workdir(tmp_path):
    return Workdir(tmp_path / "run")


def marked(workdir, **changes):
    """A run's folder, as code wrote it that noted less."""
    workdir.mark(CONFIG, None)
    values = json.loads(workdir.run_file.read_text()) | changes
    values = {name: value for name, value in values.items() if value != "not there"}
    workdir.run_file.write_text(json.dumps(values))
    return workdir


class TestIsNew:
    """Where a run may start."""

    def test_what_a_start_leaves_that_was_killed_at_once(self, workdir):
        assert workdir.is_new()
        workdir.path.mkdir()
        assert workdir.is_new()
        for name in ("owner.json", "owner.json.host-7.partial", "run.json.partial", ".nfs0001"):
            (workdir.path / name).write_text("half")
        for name in ("tokenizer", "checkpoints", "tensorboard"):
            (workdir.path / name).mkdir()
        assert workdir.is_new()

    @pytest.mark.parametrize("name", ["thesis.txt", "checkpoints/6/manifest.json", "tokenizer/mine", "logs/"])
    def test_what_is_somebody_elses(self, workdir, name):
        path = workdir.path / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True)
        if not name.endswith("/"):
            path.write_text("mine")
        with pytest.raises(
            CheckpointError, match=r"not the workdir of a run: it has no run\.json; it is left as it is"
        ):
            workdir.is_new()

    def test_a_run(self, workdir):
        assert not marked(workdir).is_new()

    def test_files_and_links(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(CheckpointError, match="file is no folder; choose another --workdir"):
            Workdir(tmp_path / "file").is_new()
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match=r"link is a link to .*nowhere, which is not there: make that folder"):
            Workdir(tmp_path / "link").is_new()
        with pytest.raises(CheckpointError, match="which is not there"):
            Workdir(tmp_path / "link").record()


class TestRecord:
    """run.json."""

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"[]",
            b"null",
            b"\xff\xfe",
            b"[" * 100_000,
            b'{"config": {}}',
            b'{"rat_jax_format_version": 2}',
            b'{"rat_jax_format_version": 1, "saved_step": -1}',
            b'{"rat_jax_format_version": 1, "saved_step": true}',
            b'{"rat_jax_format_version": 1, "saved_step": "6"}',
            b'{"rat_jax_format_version": 1, "wandb_id": 6}',
            b'{"rat_jax_format_version": ' + b"1" * 5000 + b"}",
        ],
    )
    def test_damaged(self, workdir, content):
        marked(workdir).run_file.write_bytes(content)
        for read in (workdir.record, workdir.is_new):
            with pytest.raises(CheckpointError, match=r"run\.json") as caught:
                read()
            assert "\n" not in str(caught.value)

    def test_what_its_error_tells_to_write_is_enough(self, workdir):
        marked(workdir).run_file.write_text("{")
        with pytest.raises(CheckpointError) as caught:
            workdir.record()
        least = re.search(r"write (\{.*\}) into that file", str(caught.value))[1]
        workdir.run_file.write_text(least)
        assert not workdir.is_new()
        workdir.mark(CONFIG, 4)
        assert workdir.record().saved_step == 4

    def test_what_was_saved_is_noted(self, workdir):
        marked(workdir)
        assert (workdir.record().saved_step, workdir.record().notes_saves) == (None, True)
        workdir.note_saved(4)
        assert workdir.record().saved_step == 4
        assert workdir.record().checkpoint_every_steps == CONFIG.training.checkpoint_every_steps
        assert workdir.record().config["seed"] == CONFIG.seed
        workdir.mark(CONFIG, 2)
        assert workdir.record().saved_step == 2

    def test_of_older_code(self, workdir):
        record = marked(workdir, saved_step="not there", wandb_id="not there").record()
        assert (record.saved_step, record.notes_saves, record.wandb_id) == (None, False, None)

    @pytest.mark.parametrize("config", [None, [], {"training": 3}, {"training": {"checkpoint_every_steps": "6"}}])
    def test_a_config_is_for_people(self, workdir, config):
        assert marked(workdir, config=config).record().checkpoint_every_steps is None

    def test_a_folder_in_its_place(self, workdir):
        workdir.run_file.mkdir(parents=True)
        with pytest.raises(FileError, match=r"run\.json cannot be read: Is a directory"):
            workdir.record()


class TestWandb:
    """Ids of runs at Weights & Biases: no two workdirs have one, and a workdir keeps its own."""

    def test_of_two_runs_of_one_name(self, tmp_path):
        config = tiny_config("data", training__wandb_project="rat")
        runs = [Workdir(tmp_path / name / "run") for name in ("lr1", "lr2")]
        for run in runs:
            run.mark(config, None)
        ids = [run.record().wandb_id for run in runs]
        assert len(set(ids)) == 2 and None not in ids
        for run in runs:
            run.mark(config, 6)
            run.note_saved(8)
        assert [run.record().wandb_id for run in runs] == ids

    def test_none_without_a_project(self, workdir):
        assert marked(workdir).record().wandb_id is None

    def test_of_older_code_is_the_folders_name(self, workdir):
        config = tiny_config("data", training__wandb_project="rat")
        workdir.mark(config, None)
        values = json.loads(workdir.run_file.read_text())
        del values["wandb_id"]
        workdir.run_file.write_text(json.dumps(values))
        workdir.mark(config, 4)
        assert workdir.record().wandb_id == "run"


class TestTokenizer:
    """The tokenizer of a run is whole or not there."""

    def test_written_once(self, workdir):
        marked(workdir).save_tokenizer(ByteTokenizer())
        before = os.stat(workdir.tokenizer).st_ino
        workdir.save_tokenizer(ByteTokenizer())
        assert os.stat(workdir.tokenizer).st_ino == before
        workdir.save_tokenizer(IdTokenizer(29, 0))
        assert load_tokenizer(workdir.tokenizer).hash == IdTokenizer(29, 0).hash

    def test_half_of_one_is_written_again(self, workdir):
        marked(workdir)
        for folder in (workdir.tokenizer, workdir.path / "tokenizer.partial"):
            folder.mkdir()
            (folder / "tokenizer_info.json").write_text("{")
        workdir.save_tokenizer(ByteTokenizer())
        assert load_tokenizer(workdir.tokenizer).hash == ByteTokenizer().hash
        assert not (workdir.path / "tokenizer.partial").exists()

    def test_a_kill_leaves_none(self, workdir, monkeypatch):
        marked(workdir)

        def kill(self, folder):
            raise KeyboardInterrupt

        monkeypatch.setattr(ByteTokenizer, "save", kill)
        with pytest.raises(KeyboardInterrupt):
            workdir.save_tokenizer(ByteTokenizer())
        assert not workdir.tokenizer.exists()


def test_more_steps_for_a_run_are_refused_with_the_way_to_go():
    more = tiny_config("data", training__num_steps=600)
    with pytest.raises(
        CheckpointError, match=r"num_steps is 6 there, 600 now.*--workdir=ANOTHER --config.init.path=run "
    ):
        check_same_run(CONFIG, more, "run")
    with pytest.raises(CheckpointError, match=r"seed is 0 there, 1 now\. Set it back, or choose another --workdir$"):
        check_same_run(CONFIG, tiny_config("data", seed=1), "run")
