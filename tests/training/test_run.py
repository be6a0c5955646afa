"""A start of a run: what it refuses before anything is written, and what its workdir then holds."""

import errno
import json
import math
import os
import shutil
import sys
import types

import pytest

from rat_jax.checkpoints.manifest import Manifest
from rat_jax.checkpoints.model_workdir import save_model
from rat_jax.checkpoints.owner import owned
from rat_jax.checkpoints.run_log import RunLog, read_log
from rat_jax.checkpoints.store import load_model
from rat_jax.checkpoints.workdir import CheckpointError, Workdir
from rat_jax.config import ConfigError
from rat_jax.data import DataError
from rat_jax.data.corpus import Corpus, Statistics
from rat_jax.data.token_file import TokenFileWriter
from rat_jax.errors import RunStopped
from rat_jax.files import FileError
from rat_jax.program import exit_code
from rat_jax.training import run, train
from rat_jax.training.guards import Guard
from tests.full_disk import fill_disk
from tests.stopped_run import Killed, assert_same_run, kill, stop_at, tree
from tests.tiny_run import NUM_STEPS, make_corpus, tiny_config


class TestWorkdir:
    """One owner, nothing lost, and the system's refusals."""

    def test_a_second_start_is_refused_and_changes_nothing(self, config, finished_run):
        shutil.rmtree(finished_run / "checkpoints/6")
        with owned(finished_run):
            before = tree(finished_run)
            with pytest.raises(CheckpointError, match=rf"in use by process {os.getpid()} .*nothing was changed"):
                train(config, finished_run)
            assert tree(finished_run) == before
        assert train(config, finished_run).finished

    def test_a_start_while_a_step_is_done(self, config, tmp_path, monkeypatch):
        def second():
            before = tree(tmp_path / "run")
            with pytest.raises(CheckpointError, match="is in use by process"):
                train(config, tmp_path / "run")
            assert tree(tmp_path / "run") == before

        stop_at(monkeypatch, 2, second)  # before a checkpoint is written in the background
        assert train(config, tmp_path / "run").finished
        assert not (tmp_path / "run/owner.json").exists()

    def test_bad_lines_in_the_log_do_not_stop_a_run(self, config, finished_run, uninterrupted, capfd):
        shutil.rmtree(finished_run / "checkpoints/6")
        log = finished_run / "log.jsonl"
        lines = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(b"".join([lines[0], b"\n", lines[1], b"\xff\x00\n", *lines[2:], b'{"step": 6, "lo']))
        assert train(config, finished_run).finished
        assert "log.jsonl: no record is in line 2, 4, " in capfd.readouterr().err
        assert_same_run(finished_run, uninterrupted)

    def test_a_run_whose_checkpoints_are_gone_is_not_started_over(self, config, finished_run):
        shutil.rmtree(finished_run / "checkpoints")
        before = tree(finished_run)
        with pytest.raises(CheckpointError, match=r"no good checkpoint is left in .*, though step 6 was"):
            train(config, finished_run)
        assert tree(finished_run) == before

    @pytest.mark.parametrize("name", ["mark", "save_tokenizer"])
    def test_a_kill_at_the_very_first_write(self, config, uninterrupted, tmp_path, monkeypatch, name):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Workdir, name, lambda *arguments: kill())
            train(config, tmp_path / "run")
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run/run.json.partial").write_text("{")
        assert train(config, tmp_path / "run").finished
        assert_same_run(tmp_path / "run", uninterrupted)

    @pytest.mark.parametrize(
        ("name", "code"), [("run.json", 2), ("tokenizer_info.json", 1), ("log.jsonl", 1)], ids=lambda value: str(value)
    )
    def test_a_disk_that_fills_before_the_first_step(self, config, tmp_path, monkeypatch, capsys, name, code):
        with monkeypatch.context() as patch:
            fill_disk(patch, name)
            assert exit_code(lambda: train(config, tmp_path / "run").step) == code
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and name in error
        assert "cannot be written: No space left on device; make room on its disk" in error
        assert error.endswith("; no step was saved yet") == (code == 1)
        assert (tmp_path / "run").exists() == (code == 1)
        assert exit_code(lambda: 0 if train(config, tmp_path / "run").finished else 75) == 0

    def test_nothing_is_written_once_another_process_has_the_workdir(self, corpus, tmp_path, monkeypatch):
        never = {f"training__{name}_every_steps": 6 for name in ("checkpoint", "validate")}
        files, before = tmp_path / "run", {}
        monkeypatch.setattr("rat_jax.checkpoints.owner._LOOK_SECS", 0.0)

        def lose():
            (files / "owner.json").unlink()
            before.update(tree(files))

        stop_at(monkeypatch, 3, lose)
        message = r"owner\.json was removed or replaced: .* writes nothing in it any more; no step was saved yet$"
        with pytest.raises(RunStopped, match=message):
            train(tiny_config(corpus, **never), files)
        assert tree(files) == before
        assert [line["step"] for line in read_log(files / "log.jsonl")] == [1]

    def test_bad_batches_are_not_written_either(self, config, tmp_path, monkeypatch):
        monkeypatch.setattr("rat_jax.checkpoints.owner._LOOK_SECS", 0.0)
        judged = Guard.judge

        def lose_and_judge(self, step, figures, *, updated):
            (tmp_path / "run/owner.json").unlink()
            return judged(self, step, dict(figures, loss=math.nan), updated=updated)

        monkeypatch.setattr(Guard, "judge", lose_and_judge)
        with pytest.raises(RunStopped, match=r"owner\.json was removed or replaced"):
            train(config, tmp_path / "run")
        assert not (tmp_path / "run/bad_batches.jsonl").exists()

    def test_a_save_that_fails_stops_the_run_and_says_what_is_kept(self, config, uninterrupted, tmp_path, monkeypatch):
        write = Manifest.write

        def fail(self, path):
            if self.step == 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(self, path)

        monkeypatch.setattr(Manifest, "write", fail)
        message = (
            r"checkpoints/4 could not be written: No space left on device; make room on its disk; step 2 is saved, and "
            r"the same command resumes there$"
        )
        with pytest.raises(RunStopped, match=message):
            train(config, tmp_path / "run")
        monkeypatch.undo()
        assert train(config, tmp_path / "run").finished
        assert_same_run(tmp_path / "run", uninterrupted)

    def test_a_log_that_cannot_be_written_stops_the_run(self, config, tmp_path, monkeypatch):
        append = RunLog.append

        def fail(self, step, figures):
            if step == 4:
                raise FileError("log.jsonl cannot be written: No space left on device")
            append(self, step, figures)

        monkeypatch.setattr(RunLog, "append", fail)
        with pytest.raises(RunStopped, match="No space left on device; step 4 is saved"):
            train(config, tmp_path / "run")
        assert load_model(tmp_path / "run").step == 4

    def test_data_that_is_damaged_in_mid_run_stops_it(self, config, tmp_path, monkeypatch):
        def fail():
            raise DataError("id 31 is outside the vocabulary of 29")

        stop_at(monkeypatch, 2, fail)
        with pytest.raises(RunStopped, match="outside the vocabulary of 29; no step was saved yet"):
            train(config, tmp_path / "run")

    def test_a_relative_data_path_is_found_from_everywhere(self, corpus, uninterrupted, tmp_path, monkeypatch):
        monkeypatch.chdir(corpus.parent)
        train(tiny_config(corpus.name), tmp_path / "run")
        monkeypatch.chdir(tmp_path)
        loaded = load_model("run")
        assert loaded.config.data.path == str(corpus)
        assert json.loads((tmp_path / "run/run.json").read_text())["config"]["data"]["path"] == str(corpus)

    @pytest.mark.parametrize("place", ["file", "file/run", "link"])
    def test_places_where_nothing_can_be(self, config, tmp_path, place):
        (tmp_path / "file").write_text("mine")
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        with pytest.raises((CheckpointError, FileError)) as caught:
            train(config, tmp_path / place)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


class TestRefusals:
    """Bad input, before anything is written."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"training__num_steps": 7}, r"config\.training\.num_steps is 6 there, 7 now"),
            ({"model__width": 32}, r"config\.model\.width is 16 there, 32 now"),
            ({"seed": 1}, r"config\.seed is 0 there, 1 now"),
            ({"data__seq_len": 8}, r"config\.data\.seq_len is 16 there, 8 now"),
        ],
    )
    def test_workdir_of_another_config(self, corpus, finished_run, change, message):
        before = tree(finished_run)
        with pytest.raises(CheckpointError, match=message):
            train(tiny_config(corpus, **change), finished_run)
        assert tree(finished_run) == before

    @pytest.mark.parametrize(("split", "field"), [("train", "content_hash"), ("validation", "validation_content_hash")])
    def test_other_data_of_the_same_path_field(self, finished_run, tmp_path, split, field):
        other = Corpus.open(make_corpus(tmp_path / "other"))
        ids = other.token_file(split).read(0, other.splits[split].num_tokens).copy()
        ids[0] = 1 + ids[0] % 28
        writer = TokenFileWriter(other.path / f"{split}.bin", other.tokenizer())
        writer.append(ids, other.splits[split].num_documents)
        writer.close()
        other.write_metadata()
        before = tree(finished_run)
        with pytest.raises(DataError, match=f"other batches: {field} was"):
            train(tiny_config(other.path), finished_run)
        assert tree(finished_run) == before

    @pytest.mark.parametrize("split", ["train", "validation"])
    def test_changed_data(self, finished_run, tmp_path, split):
        other = make_corpus(tmp_path / "other")
        content = bytearray((other / f"{split}.bin").read_bytes())
        content[8192 + 40] ^= 1
        (other / f"{split}.bin").write_bytes(content)
        before = tree(finished_run)
        for workdir in (finished_run, tmp_path / "new"):
            with pytest.raises(DataError, match=rf"{split}\.bin: block 0 of 1 \(bytes 8192 to \d+\) is not what was"):
                train(tiny_config(other), workdir)
        assert tree(finished_run) == before
        assert not (tmp_path / "new").exists()

    def test_other_tokenizer(self, config, corpus, uninterrupted, tmp_path):
        from rat_jax.data.tokenizer import IdTokenizer

        save_model(tmp_path / "run", config, load_model(uninterrupted).model, 0, IdTokenizer(29, 28))
        with pytest.raises(DataError, match="another tokenizer"):
            train(config, tmp_path / "run")

    def test_foreign_workdir(self, config, tmp_path):
        (tmp_path / "thesis.txt").write_text("mine")
        with pytest.raises(CheckpointError, match=r"not the workdir of a run: it has no run\.json"):
            train(config, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"data__path": "nowhere"}, DataError, "nowhere is not a prepared corpus"),
            ({"model__vocab_size": 30}, DataError, "vocabulary of 29, but the model's is 30"),
            ({"mesh__data": 3}, ConfigError, r"mesh\.data 3, .* do not multiply to the 1 devices"),
            ({"training__wandb_project": "rat"}, ConfigError, "Weights & Biases is not installed"),
        ],
    )
    def test_settings(self, corpus, tmp_path, monkeypatch, change, error, message):
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(error, match=message):
            train(tiny_config(corpus, **change), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_hosts_go_by_the_log_that_the_first_sees(as_host, finished_run, monkeypatch):
    def look():
        return run._records(Workdir(finished_run), NUM_STEPS)

    records = as_host(0, look)
    assert isinstance(run._validation_loss(records), float) and records == look()
    monkeypatch.setattr(run, "read_log", pytest.fail)
    assert as_host(1, look) == records


def test_bits_per_byte_at_the_end_of_a_run_are_those_of_the_corpus(capsys):
    statistics = Statistics(num_documents=3, num_tokens=20, num_bytes=33, byte_entropy_nats=2.0)
    corpus = types.SimpleNamespace(splits={"validation": statistics}, total=statistics)
    ended = types.SimpleNamespace(
        config=tiny_config("nowhere"),
        corpora=types.SimpleNamespace(by_name={"": corpus}, first=corpus),
        validation=types.SimpleNamespace(describe=lambda: "the whole validation split"),
    )
    run._Run._report(ended, 3.0)
    nats = 3.0 * 17 / 33
    assert f"{nats:.4f} nats a byte, {nats / math.log(2):.4f} bits a byte\n" in capsys.readouterr().err
    ended.config = tiny_config("nowhere", data__first_target_id=3)  # not the loss of the text
    run._Run._report(ended, 3.0)
    assert "a byte" not in capsys.readouterr().err
