"""Checkpoints of the PyTorch release of RAT as workdirs, and back.

  python -m rat_jax.release import FILE.pth WORKDIR --tokenizer=path/to/llama-2/tokenizer.model
  python -m rat_jax.release export WORKDIR FILE.pth

`import` makes a workdir that eval.py and generate.py work with, and from which train.py starts; `export` writes a
run's newest checkpoint as the release stores its own. Only these two commands need torch. Exit codes: 0; 2 if the file
or the workdir does not fit.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from rat_jax.checkpoints.store import load_model, save_model
from rat_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from rat_jax.data.tokenizer_files import read_tokenizer
from rat_jax.errors import RatJaxError
from rat_jax.release.file import ReleaseFile, read_release_file, write_release_file
from rat_jax.release.model_config import ReleaseError, release_model_config
from rat_jax.release.weights import model_from_release, release_state_dict


def _recipe(model: ModelConfig, seq_len: int) -> Config:
    """The paper's recipe around a model: a file of the release is not relied on for more than its model."""
    return Config(
        model=model,
        data=DataConfig(path="data/fineweb-edu", seq_len=seq_len, global_batch_size=512, num_workers=4),
        optimizer=OptimizerConfig(accumulation_steps=16),
        training=TrainingConfig(num_steps=52_452),
    )


def _import(arguments: argparse.Namespace) -> str:
    tokenizer = None if arguments.tokenizer is None else read_tokenizer(arguments.tokenizer, arguments.eos_token)
    contents = read_release_file(arguments.file)
    model = model_from_release(contents.state_dict, contents.model_config, arguments.dtype)
    if tokenizer is not None and tokenizer.vocab_size != model.config.vocab_size:
        raise ReleaseError(
            f"{arguments.tokenizer} has {tokenizer.vocab_size} tokens, the model of {arguments.file} has "
            f"{model.config.vocab_size}"
        )
    seq_len = contents.model_config["embedding"]["seq_len"]
    save_model(arguments.workdir, _recipe(model.config, seq_len), model, contents.step, tokenizer)
    hint = "" if tokenizer else "\nwithout --tokenizer the workdir has no tokenizer; generate.py then wants --data_path"
    return f"{arguments.workdir}: {', '.join(model.config.pattern)}, step {contents.step}{hint}"


def _export(arguments: argparse.Namespace) -> str:
    loaded = load_model(arguments.workdir)
    model_config = release_model_config(loaded.config.model, loaded.config.data.seq_len)
    write_release_file(arguments.file, ReleaseFile(release_state_dict(loaded.model), model_config, loaded.step))
    return f"{arguments.file}: {loaded.path}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m rat_jax.release", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("import", help="make a workdir from a file of the release")
    command.add_argument("file", type=pathlib.Path)
    command.add_argument("workdir", type=pathlib.Path, help="missing or empty")
    command.add_argument(
        "--tokenizer", type=pathlib.Path, help="of the model: SentencePiece .model, tokenizer.json or a prepared corpus"
    )
    command.add_argument("--eos_token", help="the token that ends a document, if the tokenizer's file does not say it")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the computation")
    command.set_defaults(run=_import)
    command = commands.add_parser("export", help="write a file of the release from a workdir")
    command.add_argument("workdir", type=pathlib.Path)
    command.add_argument("file", type=pathlib.Path, help="new file")
    command.set_defaults(run=_export)
    parsed = parser.parse_args(arguments)
    try:
        print(parsed.run(parsed))
    except RatJaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
