"""Faults in one of several corpora, and in what a config says of them."""

import json
import pathlib
import shutil
from typing import Any

from tests.data.format_1 import rewrite_corpus
from tests.faults.damage import HEADER_BYTES, Case, damaged_header, kind, rewrite
from tests.faults.mutations import mutate_bytes, mutate_json, mutate_json_text
from tests.tiny_run import make_corpus

FILES = ("train.bin", "validation.bin", "metadata.json", "tokenizer_info.json")


def _one(case: Case) -> pathlib.Path:
    """The folder of one of the corpora."""
    return pathlib.Path(_entry(case)[1]["path"])


def _entry(case: Case) -> tuple[str, dict[str, Any]]:
    """A corpus of the config, with its name."""
    return case.rng.choice(sorted(case.config["data"]["corpora"].items()))


@kind(12, "refused", reads="mixture")
def tokens_of_one_corpus_of_several_changed(case: Case) -> str:
    path = _one(case) / case.rng.choice(FILES[:2])
    return rewrite(path, lambda content: content[:HEADER_BYTES] + mutate_bytes(content[HEADER_BYTES:], case.rng))


@kind(8, "refused", reads="mixture")
def header_of_one_corpus_of_several_changed(case: Case) -> str:
    path = _one(case) / case.rng.choice(FILES[:2])
    return rewrite(path, lambda content: damaged_header(content, case.rng))


@kind(12, reads="mixture")
def metadata_of_one_corpus_of_several_changed(case: Case) -> str:
    path = _one(case) / case.rng.choice(FILES[2:])
    return rewrite(path, lambda content: mutate_json_text(content, case.rng))


@kind(6, "refused", reads="mixture")
def one_corpus_of_several_gone(case: Case) -> str:
    folder, name = _one(case), case.rng.choice([None, *FILES])
    if name is None:
        shutil.rmtree(folder)
        return str(folder)
    (folder / name).unlink()
    return str(folder / name)


@kind(4, "refused", reads="mixture")
def corpora_of_a_mixture_swapped(case: Case) -> str:
    corpora = case.config["data"]["corpora"]
    match case.rng.randrange(3):
        case 0:
            corpora["one"]["path"], corpora["two"]["path"] = corpora["two"]["path"], corpora["one"]["path"]
            return "in the config"
        case 1:
            corpora["one"]["path"] = corpora["two"]["path"]
            return "one of them is named twice"
        case _:
            name = case.rng.choice(FILES[:3])
            shutil.copyfile(case.corpus / name, pathlib.Path(corpora["two"]["path"]) / name)
            return f"{name} of one in the place of the other's"


@kind(8, "refused", reads="mixture")
def weight_of_a_corpus_changed(case: Case) -> str:
    name, entry = _entry(case)
    entry["weight"] = entry["weight"] * case.rng.choice([1 + 1e-12, 0.5, 1e3, 1e-300, 1e308, 0, -1])
    return f"{name} to {entry['weight']}"


@kind(16, reads="mixture")
def what_a_config_says_of_several_corpora_changed(case: Case) -> str:
    data = case.config["data"]
    data["corpora"] = mutate_json(data["corpora"], case.rng)
    return json.dumps(data["corpora"])


@kind(6, "refused", reads="mixture")
def a_corpus_added_left_out_or_renamed(case: Case) -> str:
    data = case.config["data"]
    corpora, (name, entry) = data["corpora"], _entry(case)
    match case.rng.randrange(4):
        case 0:
            corpora["three"] = entry | {"weight": 1e-9}
            return "added"
        case 1:
            del corpora[name]
            return f"{name} left out"
        case 2:
            corpora[name + case.rng.choice(["0", ".weight", "-"])] = corpora.pop(name)
            return f"{name} renamed"
        case _:
            data["path"], data["corpora"] = entry["path"], {}
            return f"{name} alone"


@kind(4, "refused", reads="mixture")
def one_corpus_of_several_prepared_again_from_other_documents(case: Case) -> str:
    """Fewer or more of them, or others of equally many tokens."""
    _, entry = _entry(case)
    changes = case.rng.choice([{"num_ids": 300}, {"num_ids": 1999}, {"num_ids": 4000}, {"line_ids": 19}])
    entry["path"] = str(make_corpus(case.data / "again", **changes))
    return f"{changes}"


@kind(2, "refused", reads="mixture")
def one_corpus_of_several_of_another_tokenizer(case: Case) -> str:
    name, entry = _entry(case)
    entry["path"] = str(make_corpus(case.data / "again", vocab_size=31))
    return name


@kind(3, "continued", reads="mixture")
def corpora_of_a_mixture_elsewhere(case: Case) -> str:
    """Moved, behind a link, or in the other order in the config."""
    data, (name, entry) = case.config["data"], _entry(case)
    match case.rng.randrange(3):
        case 0:
            entry["path"] = str(pathlib.Path(entry["path"]).rename(case.data / "moved"))
        case 1:
            (case.data / "link").symlink_to(entry["path"])
            entry["path"] = str(case.data / "link")
        case _:
            data["corpora"] = dict(reversed(data["corpora"].items()))
    return f"{name}: {entry['path']}"


@kind(2, "continued", reads="mixture")
def one_corpus_of_several_in_the_older_format(case: Case) -> str:
    folder = _one(case)
    rewrite_corpus(folder)
    return str(folder)
