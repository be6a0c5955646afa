"""Faults in files, each tried by starting the run again: it ends like the run that nothing befell, or it is refused."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
from collections.abc import Callable
from typing import Any

from tests.faults.base import Reads
from tests.faults.mutations import ODD_VALUES, mutate_bytes, mutate_json, mutate_json_text

HEADER_BYTES = 8192


@dataclasses.dataclass
class Case:
    """Copies to damage, and the values of the config that the run is started again with."""

    data: pathlib.Path  # folder of all that the run reads
    workdir: pathlib.Path
    config: dict[str, Any]
    rng: random.Random

    @property
    def corpus(self) -> pathlib.Path:
        return self.data / "corpus"

    @property
    def checkpoints(self) -> list[pathlib.Path]:
        """Newest first."""
        folders = [path for path in (self.workdir / "checkpoints").iterdir() if path.name.isdecimal()]
        return sorted(folders, key=lambda path: -int(path.name))

    def pick(self, folder: pathlib.Path) -> pathlib.Path:
        return self.rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of fault: what it does, and what may come of it."""

    name: str
    inject: Callable[[Case], str]  # returns what was done
    times: int
    outcomes: frozenset[str]  # of "continued", "refused"
    takes_log: bool  # the fault itself takes figures of earlier steps away
    takes_newest: bool  # the fault itself takes the newest checkpoint away
    reads: Reads  # what the run was made with


KINDS: list[Kind] = []
EITHER = frozenset({"continued", "refused"})


def kind(times: int, *outcomes: str, takes_log: bool = False, takes_newest: bool = False, reads: Reads = "corpus"):
    """Enters a function into `KINDS`; without outcomes either is right."""

    def enter(inject: Callable[[Case], str]) -> Callable[[Case], str]:
        name = inject.__name__.replace("_", " ")
        KINDS.append(Kind(name, inject, times, frozenset(outcomes) or EITHER, takes_log, takes_newest, reads))
        return inject

    return enter


def damaged_header(content: bytes, rng: random.Random) -> bytes:
    """A token file with other bytes where its header's fields are."""
    while (damaged := mutate_bytes(content[:900], rng)[:900].ljust(900)) == content[:900]:
        pass
    return damaged + content[900:]


def rewrite(path: pathlib.Path, change: Callable[[bytes], bytes]) -> str:
    path.write_bytes(change(path.read_bytes()))
    return str(path)


@kind(20, "continued", takes_newest=True)
def array_file_of_the_newest_checkpoint_changed(case: Case) -> str:
    item = case.checkpoints[0] / case.rng.choice(["params", "optimizer"])
    return rewrite(case.pick(item), lambda content: mutate_bytes(content, case.rng))


@kind(12, "continued", takes_newest=True)
def array_file_of_the_newest_checkpoint_gone(case: Case) -> str:
    path = case.pick(case.checkpoints[0] / case.rng.choice(["params", "optimizer"]))
    path.unlink()
    return str(path)


@kind(8, "refused")
def an_array_file_of_every_checkpoint_changed(case: Case) -> str:
    return ", ".join(
        rewrite(case.pick(path / "params"), lambda content: mutate_bytes(content, case.rng))
        for path in case.checkpoints
    )


@kind(20, "continued", takes_newest=True)
def value_in_the_newest_manifest_changed(case: Case) -> str:
    def change(content: bytes) -> bytes:
        while (damaged := json.dumps(mutate_json(json.loads(content), case.rng)).encode()) == content:
            pass
        return damaged

    return rewrite(case.checkpoints[0] / "manifest.json", change)


@kind(12, "continued", takes_newest=True)
def bytes_of_the_newest_manifest_changed(case: Case) -> str:
    return rewrite(case.checkpoints[0] / "manifest.json", lambda content: mutate_bytes(content, case.rng))


@kind(6, "continued", takes_newest=True)
def newest_manifest_gone(case: Case) -> str:
    path = case.checkpoints[0] / "manifest.json"
    path.unlink()
    return str(path)


@kind(4, "refused")
def all_manifests_gone(case: Case) -> str:
    for path in case.checkpoints:
        (path / "manifest.json").unlink()
    return "all"


@kind(4, "refused")
def folder_of_checkpoints_gone_or_empty(case: Case) -> str:
    folder = case.workdir / "checkpoints"
    shutil.rmtree(folder)
    if case.rng.random() < 0.5:
        folder.mkdir()
    return str(folder)


@kind(6, "continued")
def checkpoint_under_the_number_of_another_step(case: Case) -> str:
    newest = case.checkpoints[0]
    other = newest.with_name(str(int(newest.name) + case.rng.randint(1, 9)))
    shutil.copytree(newest, other)
    return str(other)


@kind(8)
def foreign_files_among_the_checkpoints(case: Case) -> str:
    name = case.rng.choice(["9", "notes.txt", ".nfs000", "8.orbax-checkpoint-tmp-1", "12", "latest", "4 (copy)"])
    path = case.workdir / "checkpoints" / name
    if case.rng.random() < 0.5:
        path.write_bytes(case.rng.randbytes(20))
    else:
        path.mkdir()
        (path / "file").write_bytes(case.rng.randbytes(20))
    return str(path)


@kind(20, "continued")
def lines_of_the_log_damaged(case: Case) -> str:
    path = case.workdir / "log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    at = case.rng.randrange(len(lines) + 1)
    junk = [
        b"\n",
        b"{\n",
        b"\xff\xfe\0\n",
        b"null\n",
        b"[1]\n",
        b"3\n",
        b'{"step": "x"}\n',
        b"{}\n",
        b'{"step": 1',
        b"\0" * 40,
    ]
    piece = case.rng.choice(junk)
    lines.insert(at, piece if at == len(lines) or piece.endswith(b"\n") else piece + b"\n")
    path.write_bytes(b"".join(lines))
    return f"line {at + 1}: {lines[at][:20]!r}"


@kind(16, "continued", "refused")
def marker_of_the_run_damaged(case: Case) -> str:
    return rewrite(case.workdir / "run.json", lambda content: mutate_json_text(content, case.rng))


@kind(3, "refused")
def marker_of_the_run_gone(case: Case) -> str:
    (case.workdir / "run.json").unlink()
    return "run.json"


@kind(20, "refused")
def bytes_of_the_training_tokens_changed(case: Case) -> str:
    def change(content: bytes) -> bytes:
        tokens = mutate_bytes(content[HEADER_BYTES:], case.rng)
        return content[:HEADER_BYTES] + tokens

    return rewrite(case.corpus / "train.bin", change)


@kind(20, "refused")
def a_token_replaced_by_another_of_the_vocabulary(case: Case) -> str:
    path = case.corpus / case.rng.choice(["train.bin", "validation.bin"])
    content = bytearray(path.read_bytes())
    at = HEADER_BYTES + 2 * case.rng.randrange((len(content) - HEADER_BYTES) // 2)
    content[at] = (content[at] + case.rng.randint(1, 28)) % 29
    path.write_bytes(content)
    return f"{path} at {at}"


@kind(12, "refused")
def bytes_of_the_validation_tokens_changed(case: Case) -> str:
    path = case.corpus / "validation.bin"
    return rewrite(path, lambda content: content[:HEADER_BYTES] + mutate_bytes(content[HEADER_BYTES:], case.rng))


@kind(2, "refused")
def splits_swapped(case: Case) -> str:
    a, b = case.corpus / "train.bin", case.corpus / "validation.bin"
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)
    return "train.bin and validation.bin"


@kind(20, "refused", "continued")
def header_of_a_token_file_changed(case: Case) -> str:
    path = case.corpus / case.rng.choice(["train.bin", "validation.bin"])
    content = path.read_bytes()
    start = content.index(b'{"')
    end = content.rindex(b"}", 0, HEADER_BYTES) + 1
    fields = json.dumps(mutate_json(json.loads(content[start:end]), case.rng)).encode()
    path.write_bytes((content[:start] + fields).ljust(HEADER_BYTES)[:HEADER_BYTES] + content[HEADER_BYTES:])
    return f"{path}: {fields[:200]!r}"


@kind(20)
def metadata_of_the_corpus_changed(case: Case) -> str:
    return rewrite(case.corpus / "metadata.json", lambda content: mutate_json_text(content, case.rng))


@kind(12, "refused")
def tokenizer_of_the_corpus_changed(case: Case) -> str:
    path = case.corpus / "tokenizer_info.json"
    values = json.loads(path.read_text())
    values[case.rng.choice(sorted(values))] = case.rng.choice([value for value in ODD_VALUES if value != float("inf")])
    path.write_text(json.dumps(values))
    return f"{path}: {values}"


@kind(12)
def tokenizer_of_the_run_changed(case: Case) -> str:
    path = case.pick(case.workdir / "tokenizer")
    if case.rng.random() < 0.2:
        path.unlink()
        return f"{path} removed"
    return rewrite(path, lambda content: mutate_json_text(content, case.rng))


@kind(8, "refused")
def a_file_of_the_corpus_gone(case: Case) -> str:
    path = case.corpus / case.rng.choice(["train.bin", "validation.bin", "metadata.json", "tokenizer_info.json"])
    path.unlink()
    return str(path)


@kind(6, "continued")
def pictures_and_trackers_gone_or_damaged(case: Case) -> str:
    path = case.workdir / case.rng.choice(["loss_curve.png", "tensorboard"])
    if path.is_dir():
        shutil.rmtree(path)
        if case.rng.random() < 0.5:
            path.write_bytes(b"a file where a folder was")
    else:
        path.unlink(missing_ok=True)
        path.mkdir()
    return str(path)


@kind(8, takes_log=True, takes_newest=True)
def a_folder_where_a_file_should_be(case: Case) -> str:
    path = case.rng.choice(
        [
            case.workdir / "run.json",
            case.workdir / "log.jsonl",
            case.corpus / "metadata.json",
            case.corpus / "train.bin",
            case.checkpoints[0] / "manifest.json",
        ]
    )
    path.unlink()
    path.mkdir()
    return str(path)


@kind(6, takes_log=True)
def dangling_or_circular_links(case: Case) -> str:
    path = case.rng.choice([case.workdir / "log.jsonl", case.workdir / "run.json", case.corpus / "train.bin"])
    path.unlink()
    os.symlink(case.rng.choice([str(path), "/nowhere/at/all"]), path)
    return str(path)


@kind(4, "continued")
def rests_of_files_half_written(case: Case) -> str:
    for path in (case.workdir / "run.json.partial", case.workdir / "log.jsonl.partial"):
        path.write_bytes(case.rng.randbytes(case.rng.randrange(40)))
    return "*.partial"
