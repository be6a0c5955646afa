"""Continues prompts with a trained model.

  python generate.py --workdir=runs/default --prompt="import os"
  python generate.py --workdir=runs/default --prompts_file=prompts.jsonl --output_file=texts.jsonl --temperature=0.8

Prints each prompt with its continuation; of a single prompt as it is made. Exit codes: 0; 2 if the workdir, its
checkpoint, the prompts or a setting do not fit.
"""

import pathlib
import sys

from absl import app, flags, logging

from rat_jax.checkpoints import Workdir, load_model
from rat_jax.errors import RatJaxError
from rat_jax.sampling import generate
from rat_jax.sampling.completions import CompletionWriter
from rat_jax.sampling.prompts import PromptError, find_tokenizer, read_prompts

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
_STEP = flags.DEFINE_integer("step", None, "use the checkpoint of this step; left out: the newest")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "text to continue, may be empty; give it again for several")
_PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file", None, 'prompts, one a line; in a file called *.jsonl: {"prompt": "..."} a line'
)
_OUTPUT_FILE = flags.DEFINE_string("output_file", None, "new file for JSON lines with prompt and completion")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "tokens after which a text ends if it has not before")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token, 1 draws as the model predicts")
_TOP_K = flags.DEFINE_integer("top_k", None, "draw from the k likeliest tokens; left out: from all")
_TOP_P = flags.DEFINE_float("top_p", None, "draw from the likeliest tokens that reach this probability")
_REPETITION_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "above 1: tokens that were there are less likely")
_SEED = flags.DEFINE_integer("seed", 0, "of the random numbers")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "prompts that are continued at a time", lower_bound=1)
_DATA_PATH = flags.DEFINE_string("data_path", None, "prepared corpus of the tokenizer, where the workdir has none")


def _generate() -> None:
    prompts = _PROMPT.value + ([] if _PROMPTS_FILE.value is None else read_prompts(pathlib.Path(_PROMPTS_FILE.value)))
    if not prompts:
        raise PromptError("there is nothing to continue: give --prompt or --prompts_file")
    loaded = load_model(_WORKDIR.value, _STEP.value, report=lambda line: print(line, file=sys.stderr))
    tokenizer = find_tokenizer(Workdir(pathlib.Path(_WORKDIR.value)), loaded.config, _DATA_PATH.value)
    output_file = None if _OUTPUT_FILE.value is None else pathlib.Path(_OUTPUT_FILE.value)
    writer = CompletionWriter(prompts, tokenizer, output_file)
    generate(
        loaded.model,
        writer.prompt_ids,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        repetition_penalty=_REPETITION_PENALTY.value,
        seed=_SEED.value,
        eos_id=tokenizer.eos_id,
        batch_size=_BATCH_SIZE.value,
        on_tokens=writer.add,
    )


def main(arguments: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax reports each step of a restore
    try:
        if len(arguments) > 1:
            raise PromptError(f"{arguments[1]!r} is no flag; put a prompt with spaces in quotes")
        _generate()
    except RatJaxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main)
