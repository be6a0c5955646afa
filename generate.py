"""Continues prompts with a trained model.

  python generate.py --workdir=runs/default --prompt="import os"
  python generate.py --workdir=runs/default --prompts_file=prompts.jsonl --output_file=texts.jsonl --temperature=0.8

Prints each prompt with its continuation; of a single prompt as it is made. The output file gets a line of JSON for each
prompt, in their order: the fields of its record, `completion`, and `sampling`, the settings. The same command given
again goes on after the lines that are there. Exit codes: 0; 2 if flags, the workdir, its checkpoint, the prompts or the
output file do not fit, and nothing was changed; 75 if Ctrl-C ended it; 1 if the output file could not be written.
"""

from rat_jax import interrupts, stopwatch

if __name__ == "__main__":
    interrupts.exit_while_importing()

import sys

from absl import flags

from rat_jax import program
from rat_jax.checkpoints import Workdir, load_model
from rat_jax.compilation_cache import define_cache_flag
from rat_jax.paths import local_path
from rat_jax.sampling import generate
from rat_jax.sampling.completions import CompletionWriter
from rat_jax.sampling.output_file import OutputFile
from rat_jax.sampling.prompts import Prompt, PromptError, find_tokenizer, read_prompts

_use_compilation_cache = define_cache_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
_STEP = flags.DEFINE_integer("step", None, "use the checkpoint of this step; left out: the newest")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "text to continue, may be empty; give it again for several")
_PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file",
    None,
    'prompts, one a line; in a file called *.jsonl: {"prompt": "..."} a line; in *.json an array of either',
)
_OUTPUT_FILE = flags.DEFINE_string("output_file", None, "file for JSON lines; what is there is gone on with")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "tokens after which a text ends if it has not before")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token, 1 draws as the model predicts")
_TOP_K = flags.DEFINE_integer("top_k", None, "draw from the k likeliest tokens; left out: from all")
_TOP_P = flags.DEFINE_float("top_p", None, "draw from the likeliest tokens that reach this probability")
_REPETITION_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "above 1: tokens that were there are less likely")
_SEED = flags.DEFINE_integer("seed", 0, "of the random numbers")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "prompts that are continued at a time", lower_bound=1)
_DATA_PATH = flags.DEFINE_string("data_path", None, "prepared corpus of the tokenizer, where the workdir has none")


def _prompts() -> list[Prompt]:
    prompts = [Prompt.of(text, f"--prompt number {number}") for number, text in enumerate(_PROMPT.value, start=1)]
    if _PROMPTS_FILE.value is not None:
        prompts += read_prompts(local_path(_PROMPTS_FILE.value, "--prompts_file"))
    if not prompts:
        raise PromptError("there is nothing to continue: give --prompt or --prompts_file")
    return prompts


def _continue(prompts: list[Prompt], output_file: OutputFile | None) -> None:
    times = stopwatch.Stopwatch()
    workdir = Workdir(local_path(_WORKDIR.value, "--workdir"))
    _use_compilation_cache()
    loaded = load_model(workdir.path, _STEP.value, report=lambda line: print(line, file=sys.stderr))
    writer = CompletionWriter(prompts, find_tokenizer(workdir, loaded.config, _DATA_PATH.value), output_file)
    times.lap("load")

    def add(row: int, tokens: list[int]) -> bool | None:
        times.add_tokens(len(tokens))
        return writer.add(row, tokens)

    settings = {
        "max_new_tokens": _MAX_NEW_TOKENS.value,
        "temperature": _TEMPERATURE.value,
        "top_k": _TOP_K.value,
        "top_p": _TOP_P.value,
        "repetition_penalty": _REPETITION_PENALTY.value,
        "seed": _SEED.value,
    }
    if output_file is not None:
        output_file.go_on({"step": loaded.step, **settings})
    generate(
        loaded.model,
        writer.prompt_ids,
        **settings,
        eos_id=writer.eos_id,
        batch_size=_BATCH_SIZE.value,
        first=0 if output_file is None else output_file.num_done,
        on_tokens=add,
    )
    times.report()


def main() -> int:
    prompts = _prompts()
    if _OUTPUT_FILE.value is None:
        _continue(prompts, None)
        return 0
    output_file = OutputFile(local_path(_OUTPUT_FILE.value, "--output_file"), prompts)
    if output_file.num_done > 0:
        print(f"{output_file.path}: {output_file.num_done} of {len(prompts)} completions are there", file=sys.stderr)
    try:
        if output_file.num_done < len(prompts):
            _continue(prompts, output_file)
    except KeyboardInterrupt:
        done = f"{output_file.num_done} of {len(prompts)} completions are in {output_file.path}"
        print(f"interrupted: {done}; the same command goes on", file=sys.stderr)
        return program.INTERRUPTED
    return 0


if __name__ == "__main__":
    program.run(main, required=["workdir"], interrupts="raise")
