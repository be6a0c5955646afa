"""Every reader of bytes that come from elsewhere, on damaged ones: it refuses them in words, or what it reads is right.

python -m tests.faults.fuzz --count 2000     inputs for each reader
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from rat_jax.checkpoints.manifest import MANIFEST_FILE, Manifest
from rat_jax.checkpoints.run_log import read_log
from rat_jax.checkpoints.workdir import Workdir
from rat_jax.config import config_from_dict, config_to_dict
from rat_jax.data.chat_template import ChatTemplate, load_chat_template, read_chat_template
from rat_jax.data.corpus import Corpus
from rat_jax.data.document import ReadOptions
from rat_jax.data.example import ExampleReader
from rat_jax.data.sources import parse_source
from rat_jax.data.token_header import HEADER_BYTES, Header
from rat_jax.data.tokenizer import load_tokenizer
from rat_jax.data.tokenizer_files import read_tokenizer
from rat_jax.errors import RatJaxError
from rat_jax.release import model_from_release
from rat_jax.release.file import ReleaseFile, read_release_file, write_release_file
from rat_jax.release.model_config import release_model_config
from rat_jax.sampling.prompts import read_prompts
from tests.faults.base import Base
from tests.faults.mutations import mutate_bytes, mutate_json, mutate_json_text


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader, a good input, and what damage does to it."""

    name: str
    good: bytes
    damage: Callable[[bytes, random.Random], bytes]
    read: Callable[[bytes], Any]
    is_checked: bool = False  # by a checksum: damaged bytes are refused, or mean the same


def try_one(reader: Reader, seed: int, good_value: Any) -> tuple[str, str]:
    """What comes of one damaged input: "refused", "read" or what is wrong; and the input, for the latter."""
    content = reader.damage(reader.good, random.Random(f"{reader.name} {seed}"))
    try:
        value = reader.read(content)
    except RatJaxError:
        return "refused", ""
    except BaseException as error:  # a panic of Rust code is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return "traceback", f"{traceback.format_exc()[-900:]} for {content[:400]!r}"
    if reader.is_checked and value != good_value:
        return "wrongly accepted", f"{content[:400]!r}"
    return "read", ""


def readers(base: Base, folder: pathlib.Path) -> list[Reader]:
    """All of them; `folder` is written into."""
    return [
        *_of_corpora(base, folder / "corpus"),
        *_of_runs(base, folder / "run"),
        *_of_releases(folder / "release"),
        *_of_texts(folder / "texts"),
    ]


def _of_corpora(base: Base, folder: pathlib.Path) -> list[Reader]:
    folder.mkdir()
    header = (base.corpus / "train.bin").read_bytes()[:HEADER_BYTES]

    def read_header(content: bytes) -> Header:
        return Header.from_bytes(content, folder / "header.bin")

    def read_metadata(content: bytes) -> Any:
        (folder / "metadata.json").write_bytes(content)
        return dataclasses.asdict(Corpus.open(folder))

    def read_info(content: bytes) -> str:
        (folder / "tokenizer_info.json").write_bytes(content)
        return load_tokenizer(folder).hash

    tokenizer_json = _small_bpe()

    def read_tokenizer_json(content: bytes) -> list[int]:
        (folder / "tokenizer.json").write_bytes(content)
        return read_tokenizer(folder / "tokenizer.json", "<|endoftext|>").encode("def f(x): return x")

    def read_tokenizer_config(content: bytes) -> int:
        (folder / "tokenizer.json").write_bytes(tokenizer_json)
        (folder / "tokenizer_config.json").write_bytes(content)
        return read_tokenizer(folder / "tokenizer.json", None).eos_id

    def damage_header(content: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return mutate_bytes(content[:1000], rng).ljust(HEADER_BYTES)[:HEADER_BYTES]
        start, end = content.index(b'{"'), content.rindex(b"}") + 1
        changed = json.dumps(mutate_json(json.loads(content[start:end]), rng)).encode()
        return (content[:start] + changed).ljust(HEADER_BYTES)[:HEADER_BYTES]

    config = json.dumps({"eos_token": {"content": "<|endoftext|>"}, "model_max_length": 1024}).encode()
    metadata, info = ((base.corpus / name).read_bytes() for name in ("metadata.json", "tokenizer_info.json"))
    return [
        Reader("token file header", header, damage_header, read_header, is_checked=True),
        Reader("metadata.json", metadata, mutate_json_text, read_metadata, is_checked=True),
        Reader("tokenizer_info.json", info, mutate_json_text, read_info, is_checked=True),
        Reader("tokenizer.json", tokenizer_json, mutate_json_text, read_tokenizer_json),
        Reader("tokenizer_config.json", config, mutate_json_text, read_tokenizer_config),
    ]


def _small_bpe() -> bytes:
    from rat_jax.data.tokenizer import train_bpe

    return train_bpe(["def f(x):\n    return x\n" * 20, "import os\nimport re\n"], 270).model[1]


def _of_runs(base: Base, folder: pathlib.Path) -> list[Reader]:
    checkpoint = folder / "checkpoints/4"
    checkpoint.mkdir(parents=True)
    config = config_to_dict(base.config(base.data))

    def read_manifest(content: bytes) -> Any:
        (checkpoint / MANIFEST_FILE).write_bytes(content)
        return dataclasses.asdict(Manifest.read(checkpoint))

    def read_marker(content: bytes) -> None:
        (folder / "run.json").write_bytes(content)
        Workdir(folder).require_run()

    def read_lines(content: bytes) -> int:
        (folder / "log.jsonl").write_bytes(content)
        return len(read_log(folder / "log.jsonl"))

    manifest = (base.stopped / "checkpoints/4" / MANIFEST_FILE).read_bytes()
    marker, log = ((base.stopped / name).read_bytes() for name in ("run.json", "log.jsonl"))
    return [
        Reader("manifest.json", manifest, mutate_json_text, read_manifest, is_checked=True),
        Reader("run.json", marker, mutate_json_text, read_marker),
        Reader("log.jsonl", log, mutate_bytes, read_lines),
        Reader("config", json.dumps(config).encode(), _other_values, lambda c: config_from_dict(json.loads(c))),
    ]


def _other_values(content: bytes, rng: random.Random) -> bytes:
    return json.dumps(mutate_json(json.loads(content), rng)).encode()


def _of_releases(folder: pathlib.Path) -> list[Reader]:
    from flax import nnx

    from rat_jax.config import ModelConfig
    from rat_jax.model import LanguageModel
    from rat_jax.release import release_state_dict

    folder.mkdir()
    model_config = ModelConfig(vocab_size=7, width=8, num_layers=1, num_heads=2, pattern=("rat",))
    model = LanguageModel(model_config, rngs=nnx.Rngs(0))
    described, weights = release_model_config(model_config, 16), release_state_dict(model)
    write_release_file(folder / "good.pth", ReleaseFile(weights, described, 3))

    def read_file(content: bytes) -> dict[str, Any]:
        (folder / "damaged.pth").write_bytes(content)
        read = read_release_file(folder / "damaged.pth")
        return {name: np.asarray(value).tolist() for name, value in read.state_dict.items()}

    def read_config(content: bytes) -> None:
        model_from_release(weights, json.loads(content))

    return [
        Reader(".pth", (folder / "good.pth").read_bytes(), mutate_bytes, read_file, is_checked=True),
        Reader("release's configuration", json.dumps(described).encode(), _other_values, read_config),
    ]


def _of_texts(folder: pathlib.Path) -> list[Reader]:
    folder.mkdir()
    options = ReadOptions("text", None, "refuse")

    def source(name: str, options: ReadOptions = options) -> Callable[[bytes], int]:
        def read(content: bytes) -> int:
            (folder / name).write_bytes(content)
            return sum(len(document.text) for document in parse_source(str(folder / name), options).documents())

        return read

    def read_template(content: bytes) -> int:
        (folder / "chat.jinja").write_bytes(content)
        return len(read_chat_template(folder / "chat.jinja").turns(messages, "a chat"))

    def read_stored_template(content: bytes) -> ChatTemplate | None:
        (folder / "chat_template.json").write_bytes(content)
        return load_chat_template(folder)

    def prompts(name: str) -> Callable[[bytes], int]:
        def read(content: bytes) -> int:
            (folder / name).write_bytes(content)
            return len(read_prompts(folder / name))

        return read

    import gzip
    import io

    import pyarrow
    import pyarrow.parquet

    lines = b'{"text": "one"}\n{"text": "two \\u00e9", "n": 3}\n'
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two é", "three"]}), table)
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    chat = "{% for m in messages %}{{ m.role + ': ' + m.content }}{{ eos_token }}{% endfor %}"
    template = ChatTemplate(chat + "{% if add_generation_prompt %}assistant: {% endif %}")
    template.save(folder)
    stored = (folder / "chat_template.json").read_bytes()
    example_lines = b'{"prompt": "a", "answer": ["b", "\\u00e9"]}\n' + json.dumps({"messages": messages}).encode()
    examples = dataclasses.replace(options, read_record=ExampleReader(template))
    prompt_lines = b'{"prompt": "import os"}\n{"prompt": "def \\u00e9", "n": 3}\n'
    return [
        Reader("text", "Zwei Wörter.\nUnd noch eins.\n".encode(), mutate_bytes, source("a.txt")),
        Reader("JSON lines", lines, mutate_bytes, source("a.jsonl")),
        Reader("compressed JSON lines", gzip.compress(lines, mtime=0), mutate_bytes, source("a.jsonl.gz")),
        Reader("Parquet", table.getvalue(), mutate_bytes, source("a.parquet")),
        Reader("prompts, text", b"import os\n\ndef f(\n", mutate_bytes, prompts("p.txt")),
        Reader("prompts, JSON lines", prompt_lines, mutate_bytes, prompts("p.jsonl")),
        Reader("examples, JSON lines", example_lines, mutate_bytes, source("e.jsonl", examples)),
        Reader("chat template", template.source.encode(), mutate_bytes, read_template),
        Reader("chat_template.json", stored, mutate_json_text, read_stored_template, is_checked=True),
    ]


def fuzz(reader: Reader, first_seed: int, count: int) -> tuple[collections.Counter, list[str]]:
    """Outcomes of `count` inputs, and the first few that are wrong."""
    good_value, outcomes, wrong = reader.read(reader.good), collections.Counter(), []
    for seed in range(first_seed, first_seed + count):
        outcome, shown = try_one(reader, seed, good_value)
        outcomes[outcome] += 1
        if outcome not in ("refused", "read") and len(wrong) < 3:
            wrong.append(f"{reader.name}, seed {seed}: {outcome}: {shown}")
    return outcomes, wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="inputs for each reader (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default 0)")
    parser.add_argument("--only", default="", help="readers whose names hold this")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        base = Base.make(pathlib.Path(folder) / "base")
        (pathlib.Path(folder) / "read").mkdir()
        total, all_wrong = 0, []
        print(f"{'reader':<26} {'inputs':>7}  outcomes")
        for reader in readers(base, pathlib.Path(folder) / "read"):
            if flags.only in reader.name:
                outcomes, wrong = fuzz(reader, flags.seed * flags.count, flags.count)
                total, all_wrong = total + flags.count, all_wrong + wrong
                counts = ", ".join(f"{outcome} {count}" for outcome, count in outcomes.most_common())
                print(f"{reader.name:<26} {flags.count:>7}  {counts}", flush=True)
    print(f"{total} inputs, seed {flags.seed}: {'nothing wrong' if not all_wrong else 'wrong are, for example'}")
    print("\n".join(all_wrong))
    return 1 if all_wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
