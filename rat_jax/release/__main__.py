"""Checkpoints of the PyTorch release of RAT as workdirs, and back.

  python -m rat_jax.release import FILE.pth WORKDIR --tokenizer=path/to/llama-2/tokenizer.model
  python -m rat_jax.release export WORKDIR FILE.pth

`import` makes a workdir that eval.py and generate.py work with, and from which train.py starts; `export` writes a
run's newest checkpoint as the release stores its own. Only these two commands need torch. Exit codes: 0; 2 if flags,
the file or the workdir do not fit, and nothing was changed; 1 if the system refused a file when another was written
already.
"""

import argparse
import sys
from collections.abc import Sequence

from rat_jax import program
from rat_jax.checkpoints.model_workdir import require_unused, save_model
from rat_jax.checkpoints.store import load_model
from rat_jax.checkpoints.workdir import Workdir
from rat_jax.config import Config, ModelConfig, OptimizerConfig, TrainingConfig
from rat_jax.data.tokenizer_files import read_tokenizer
from rat_jax.data_config import DataConfig
from rat_jax.paths import local_path
from rat_jax.release.file import ReleaseFile, check_new, read_release_file, write_release_file
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


def _import(arguments: argparse.Namespace) -> None:
    file, workdir = local_path(arguments.file, "FILE"), local_path(arguments.workdir, "WORKDIR")
    require_unused(Workdir(workdir))
    tokenizer = None
    if arguments.tokenizer is not None:
        tokenizer = read_tokenizer(local_path(arguments.tokenizer, "--tokenizer"), arguments.eos_token)
    contents = read_release_file(file)
    model = model_from_release(contents.state_dict, contents.model_config, arguments.dtype)
    if tokenizer is not None and tokenizer.vocab_size != model.config.vocab_size:
        raise ReleaseError(
            f"{arguments.tokenizer} has {tokenizer.vocab_size} tokens, the model of {file} has "
            f"{model.config.vocab_size}"
        )
    seq_len = contents.model_config["embedding"]["seq_len"]
    save_model(workdir, _recipe(model.config, seq_len), model, contents.step, tokenizer)
    hint = "" if tokenizer else "\nwithout --tokenizer the workdir has no tokenizer; generate.py then wants --data_path"
    print(f"{workdir}: {', '.join(model.config.pattern)}, step {contents.step}{hint}")


def _export(arguments: argparse.Namespace) -> None:
    workdir, file = local_path(arguments.workdir, "WORKDIR"), local_path(arguments.file, "FILE")
    check_new(file)
    loaded = load_model(workdir)
    model_config = release_model_config(loaded.config.model, loaded.config.data.seq_len)
    write_release_file(file, ReleaseFile(release_state_dict(loaded.model), model_config, loaded.step))
    print(f"{file}: {loaded.path}")


def _parser() -> program.ArgumentParser:
    parser = program.ArgumentParser(prog="python -m rat_jax.release", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="{import,export}")
    command = commands.add_parser("import", help="make a workdir from a file of the release")
    command.add_argument("file")
    command.add_argument("workdir", help="missing or empty")
    command.add_argument("--tokenizer", help="of the model: SentencePiece .model, tokenizer.json or a prepared corpus")
    command.add_argument("--eos_token", help="the token that ends a document, if the tokenizer's file does not say it")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the computation")
    command.set_defaults(run=_import)
    command = commands.add_parser("export", help="write a file of the release from a workdir")
    command.add_argument("workdir")
    command.add_argument("file", help="new file")
    command.set_defaults(run=_export)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    return program.run_command(_parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())
